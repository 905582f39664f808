// LayerNorm over rows, with an optional residual add in front: sum = x + dropout(branch), y = weight * (sum - mean) *
// rstd + bias. The variance is the biased one, taken in a second pass over the row while it is in the first cache:
// E[x^2] - mean^2 would cancel for rows whose mean is large.
#pragma once

#include <math.h>

#include "column_sums.h"
#include "dropout.h"
#include "kernels.h"
#include "numbers.h"
#include "parallel.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// Four chains of additions hide the latency and shorten each chain's rounding error.
inline float row_sum(const float* x, int64_t cols) {
    Vec s[4] = {zero(), zero(), zero(), zero()};
    int64_t c = 0;
    for (; c + 4 * Vec::width <= cols; c += 4 * Vec::width)
        for (int i = 0; i < 4; ++i) s[i] = s[i] + load(x + c + i * Vec::width);
    for_each_vec(cols - c, [&](int64_t o, int64_t n) { s[0] = s[0] + load_part(x + c + o, n); });
    return sum((s[0] + s[1]) + (s[2] + s[3]));
}

// The squares of the deviations from the mean, which moves to where the deviations add up to nothing. As a rounded sum
// left it, a row whose elements are all one number would be off by that rounding times 1 / sqrt(eps).
inline float row_squares(const float* x, float& mean, int64_t cols) {
    const Vec m = broadcast(mean);
    Vec s[4] = {zero(), zero(), zero(), zero()}, off[4] = {zero(), zero(), zero(), zero()};
    const auto add = [&](int i, Vec d) { s[i] = fma(d, d, s[i]), off[i] = off[i] + d; };
    int64_t c = 0;
    for (; c + 4 * Vec::width <= cols; c += 4 * Vec::width)
        for (int i = 0; i < 4; ++i) add(i, load(x + c + i * Vec::width) - m);
    for (; c + Vec::width <= cols; c += Vec::width) add(0, load(x + c) - m);
    float rest = 0.0f, rest_off = 0.0f;  // lanes past the end would add mean^2 each
    for (; c < cols; ++c) {
        const float d = x[c] - mean;
        rest += d * d, rest_off += d;
    }
    const float by = (sum((off[0] + off[1]) + (off[2] + off[3])) + rest_off) / static_cast<float>(cols);
    const float squares = sum((s[0] + s[1]) + (s[2] + s[3])) + rest - static_cast<float>(cols) * by * by;
    mean += by;
    return squares < 0.0f ? 0.0f : squares;  // NaN stays
}

// y = scale * (x - mean) * rstd + shift for one row.
inline void normalise(const float* x, float mean, float rstd, const Numbers& scale, const Numbers& shift, float* y,
                      int64_t cols) {
    for_each_vec(cols, [&](int64_t c, int64_t n) {
        const Vec norm = (load_part(x + c, n) - broadcast(mean)) * broadcast(rstd);
        store_part(y + c, fma(norm, load(scale, c, n), load(shift, c, n)), n);
    });
}

// The same by the row's own mean and deviation, kept where they are wanted.
inline void norm_row(const float* x, const Numbers& scale, const Numbers& shift, float* y, int64_t cols, float eps,
                     float* mean = nullptr, float* rstd = nullptr) {
    float m = row_sum(x, cols) / static_cast<float>(cols);
    const float rs = 1.0f / sqrtf(row_squares(x, m, cols) / static_cast<float>(cols) + eps);
    normalise(x, m, rs, scale, shift, y, cols);
    if (mean) *mean = m, *rstd = rs;
}

// x, branch, total, y: [rows, cols] contiguous; weight, bias: [cols]; mean, rstd: [rows].
// branch and total go together and may be null, mean and rstd likewise; total may be x.
inline void layer_norm(const float* x, const float* branch, const float* weight, const float* bias, float* total,
                       float* y, float* mean, float* rstd, int64_t rows, int64_t cols, float eps, int64_t seed,
                       double dropout_p, int threads) {
    const Dropout drop(seed, dropout_p, cols);
    const int64_t grain = max(1, 16384 / max(1, cols));
    parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const float* row = x + r * cols;
            if (branch) {
                float* out = total + r * cols;
                if (drop.on())
                    drop.row(r, branch + r * cols, row, out, cols);
                else
                    for_each_vec(cols, [&](int64_t c, int64_t n) {
                        store_part(out + c, load_part(row + c, n) + load_part(branch + r * cols + c, n), n);
                    });
                row = out;
            }
            norm_row(row, {weight, kFloat32}, {bias, kFloat32}, y + r * cols, cols, eps, mean ? mean + r : nullptr,
                     rstd ? rstd + r : nullptr);
        }
    });
}

// The gradients of one row: with n = (x - mean) rstd and g = dy scale, dx = rstd (g - mean(g) - n mean(g n)) + dtotal.
// dx may be null, dtotal too; sums, where it is set, gathers dy n and dy, and then what both round off: [4, cols].
inline void norm_backward_row(const float* dy, const float* x, const Numbers& scale, float mean, float rstd,
                              const float* dtotal, float* dx, float* sums, int64_t cols) {
    const auto gather = [&](float* at, Vec added, int64_t n) {
        Vec total = load_part(at, n), lost = load_part(at + 2 * cols, n);
        add_with_rest(total, lost, added);
        store_part(at, total, n), store_part(at + 2 * cols, lost, n);
    };
    const Vec m = broadcast(mean), rs = broadcast(rstd);
    Vec sum_g = zero(), sum_gn = zero();
    for_each_vec(cols, [&](int64_t c, int64_t n) {
        const Vec d = load_part(dy + c, n), norm = (load_part(x + c, n) - m) * rs, g = d * load(scale, c, n);
        sum_g = sum_g + g;
        sum_gn = fma(g, norm, sum_gn);
        if (sums) gather(sums + c, d * norm, n), gather(sums + cols + c, d, n);
    });
    if (!dx) return;
    const Vec mean_g = broadcast(sum(sum_g) / static_cast<float>(cols));
    const Vec mean_gn = broadcast(sum(sum_gn) / static_cast<float>(cols));
    for_each_vec(cols, [&](int64_t c, int64_t n) {
        const Vec norm = (load_part(x + c, n) - m) * rs, g = load_part(dy + c, n) * load(scale, c, n);
        const Vec d = (g - fma(norm, mean_gn, mean_g)) * rs;
        store_part(dx + c, dtotal ? d + load_part(dtotal + c, n) : d, n);
    });
}

constexpr int64_t kNormChunk = 64;  // rows whose weight gradients are summed up before they join the others

inline int64_t norm_partials(int64_t rows, int64_t cols) { return (rows + kNormChunk - 1) / kNormChunk * 4 * cols; }

// The order of the sums depends on the rows alone, not on the threads.
inline void norm_backward(Team& team, const NormBackward& b) {
    const int64_t chunks = (b.rows + kNormChunk - 1) / kNormChunk, D = b.cols;
    team.share_rows(chunks, [&](int64_t chunk) {
        float* sums = b.dscale ? b.partials + chunk * 4 * D : nullptr;
        if (sums) std::memset(sums, 0, sizeof(float) * static_cast<size_t>(4 * D));
        for (int64_t r = chunk * kNormChunk; r < min(b.rows, (chunk + 1) * kNormChunk); ++r)
            norm_backward_row(b.dy + r * D, b.x + r * D, b.scale, b.mean[r], b.rstd[r],
                              b.dtotal ? b.dtotal + r * D : nullptr, b.dx ? b.dx + r * D : nullptr, sums, D);
    });
    if (!b.dscale) return;
    const int64_t vecs = up(D, Vec::width);
    team.share_rows(2 * vecs, [&](int64_t i) {
        const int64_t c = i % vecs * Vec::width, n = min(Vec::width, D - c);
        const float* sums = b.partials + (i < vecs ? 0 : D) + c;
        Vec total = zero(), lost = zero();
        for (int64_t chunk = 0; chunk < chunks; ++chunk, sums += 4 * D) {
            add_with_rest(total, lost, load_part(sums, n));
            lost = lost + load_part(sums + 2 * D, n);
        }
        store_part((i < vecs ? b.dscale : b.dshift) + c, with_rest(total, lost), n);
    });
}

// dbranch = the dropout's factors * dx, where there is a dropout.
inline void layer_norm_backward(const NormBackward& b, float* dbranch, int64_t seed, double dropout_p, int threads) {
    const Dropout drop(seed, dropout_p, b.cols);
    in_team(b.rows * b.cols < 16384 ? 1 : threads, nullptr, 0, [&](Team& team) {
        norm_backward(team, b);
        if (dbranch)
            team.share_rows(b.rows,
                            [&](int64_t r) { drop.row(r, b.dx + r * b.cols, nullptr, dbranch + r * b.cols, b.cols); });
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
