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
    for (; c + Vec::width <= cols; c += Vec::width) f(c, Vec::width);
    if (c < cols) f(c, cols - c);
}

FASTGPT_INLINE Vec load_part(const float* p, int64_t n) { return n == Vec::width ? load(p) : load(p, n); }
FASTGPT_INLINE void store_part(float* p, Vec v, int64_t n) { n == Vec::width ? store(p, v) : store(p, v, n); }

// Four chains of additions hide the latency and shorten each chain's rounding error.
inline float row_sum(const float* x, int64_t cols) {
    Vec s[4] = {zero(), zero(), zero(), zero()};
    int64_t c = 0;
    for (; c + 4 * Vec::width <= cols; c += 4 * Vec::width)
        for (int i = 0; i < 4; ++i) s[i] = s[i] + load(x + c + i * Vec::width);
    for_each_vec(cols - c, [&](int64_t o, int64_t n) { s[0] = s[0] + load_part(x + c + o, n); });
    return sum((s[0] + s[1]) + (s[2] + s[3]));
}

inline float row_squares(const float* x, float mean, int64_t cols) {
    const Vec m = broadcast(mean);
    Vec s[4] = {zero(), zero(), zero(), zero()};
    int64_t c = 0;
    for (; c + 4 * Vec::width <= cols; c += 4 * Vec::width)
        for (int i = 0; i < 4; ++i) {
            const Vec d = load(x + c + i * Vec::width) - m;
            s[i] = fma(d, d, s[i]);
        }
    for (; c + Vec::width <= cols; c += Vec::width) {
        const Vec d = load(x + c) - m;
        s[0] = fma(d, d, s[0]);
    }
    float rest = 0.0f;  // lanes past the end would add mean^2 each
    for (; c < cols; ++c) rest += (x[c] - mean) * (x[c] - mean);
    return sum((s[0] + s[1]) + (s[2] + s[3])) + rest;
}

// y = scale * (x - mean) * rstd + shift for one row; mean and rstd are kept where they are wanted.
inline void norm_row(const float* x, const float* scale, const float* shift, float* y, int64_t cols, float eps,
                     float* mean = nullptr, float* rstd = nullptr) {
    const float m = row_sum(x, cols) / static_cast<float>(cols);
    const float rs = 1.0f / sqrtf(row_squares(x, m, cols) / static_cast<float>(cols) + eps);
    for_each_vec(cols, [&](int64_t c, int64_t n) {
        const Vec norm = (load_part(x + c, n) - broadcast(m)) * broadcast(rs);
        store_part(y + c, fma(norm, load_part(scale + c, n), load_part(shift + c, n)), n);
    });
    if (mean) *mean = m, *rstd = rs;
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
                    store_part(out + c, load_part(row + c, n) + load_part(branch + r * cols + c, n), n);
                });
                row = out;
            }
            norm_row(row, weight, bias, y + r * cols, cols, eps, mean ? mean + r : nullptr, rstd ? rstd + r : nullptr);
        }
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
