// LayerNorm over rows, with an optional residual add in front: sum = x + branch, y = weight * (sum - mean) * rstd +
// bias. The variance is the biased one, taken in a second pass over the row while it is in the first cache: E[x^2] -
// mean^2 would cancel for rows whose mean is large.
#pragma once

#include <math.h>

#include "parallel.h"
#include "vec.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// Calls f(offset, vector length) for each vector of a row, the last one possibly short.
template <class F>
inline void for_each_vec(int64_t cols, F f) {
    int64_t c = 0;
    for (; c + Vec::W <= cols; c += Vec::W) f(c, Vec::W);
    if (c < cols) f(c, cols - c);
}

inline Vec load_part(const float* p, int64_t n) { return n == Vec::W ? Vec::load(p) : Vec::load(p, n); }
inline void store_part(Vec v, float* p, int64_t n) { n == Vec::W ? v.store(p) : v.store(p, n); }

// Four chains of additions hide the latency and shorten each chain's rounding error.
inline float row_sum(const float* x, int64_t cols) {
    Vec s[4] = {Vec::set(0), Vec::set(0), Vec::set(0), Vec::set(0)};
    int64_t c = 0;
    for (; c + 4 * Vec::W <= cols; c += 4 * Vec::W)
        for (int i = 0; i < 4; ++i) s[i] = s[i] + Vec::load(x + c + i * Vec::W);
    for_each_vec(cols - c, [&](int64_t o, int64_t n) { s[0] = s[0] + load_part(x + c + o, n); });
    return sum((s[0] + s[1]) + (s[2] + s[3]));
}

inline float row_squares(const float* x, float mean, int64_t cols) {
    const Vec m = Vec::set(mean);
    Vec s[4] = {Vec::set(0), Vec::set(0), Vec::set(0), Vec::set(0)};
    int64_t c = 0;
    for (; c + 4 * Vec::W <= cols; c += 4 * Vec::W)
        for (int i = 0; i < 4; ++i) {
            const Vec d = Vec::load(x + c + i * Vec::W) - m;
            s[i] = fma(d, d, s[i]);
        }
    for (; c + Vec::W <= cols; c += Vec::W) {
        const Vec d = Vec::load(x + c) - m;
        s[0] = fma(d, d, s[0]);
    }
    float rest = 0.0f;  // lanes past the end would add mean^2 each
    for (; c < cols; ++c) rest += (x[c] - mean) * (x[c] - mean);
    return sum((s[0] + s[1]) + (s[2] + s[3])) + rest;
}

// x, branch, total, y: [rows, cols] contiguous; weight, bias: [cols]; mean, rstd: [rows].
// branch and total go together and may be null, mean and rstd likewise; total may be x.
inline void layer_norm(const float* x, const float* branch, const float* weight, const float* bias, float* total,
                       float* y, float* mean, float* rstd, int64_t rows, int64_t cols, float eps, int threads) {
    const int64_t grain = max(1, 16384 / max(1, cols));
    parallel_for(rows, grain, threads, [=](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const float* row = x + r * cols;
            if (branch) {
                float* out = total + r * cols;
                for_each_vec(cols, [&](int64_t c, int64_t n) {
                    store_part(load_part(row + c, n) + load_part(branch + r * cols + c, n), out + c, n);
                });
                row = out;
            }
            const float m = row_sum(row, cols) / static_cast<float>(cols);
            const float rs = 1.0f / sqrtf(row_squares(row, m, cols) / static_cast<float>(cols) + eps);
            const Vec vm = Vec::set(m), vrs = Vec::set(rs);
            for_each_vec(cols, [&](int64_t c, int64_t n) {
                const Vec norm = (load_part(row + c, n) - vm) * vrs;
                store_part(fma(norm, load_part(weight + c, n), load_part(bias + c, n)), y + r * cols + c, n);
            });
            if (mean) mean[r] = m, rstd[r] = rs;
        }
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
