// The tanh GELU, with an optional bias in front (Hendrycks and Gimpel, arXiv 1606.08415).
// 0.5 x (1 + tanh u) = x / (1 + e^(-2u)) with u = sqrt(2/pi) (x + 0.044715 x^3): one exponential, no cancellation
// for negative x, and the limits come out of the arithmetic (e^(-2u) reaches infinity, the quotient 0).
#pragma once

#include "column_sums.h"

namespace fastgpt {
namespace FASTGPT_ISA {

inline Vec gelu(Vec x) {
    const Vec u2 = x * fma(x * x, broadcast(-2 * 0.7978845608028654f * 0.044715f), broadcast(-2 * 0.7978845608028654f));
    return x / (broadcast(1.0f) + exp(u2));
}

struct Gelu {
    Vec value, slope;
};

// With its derivative, s + x s (1 - s) 2u' with s = 1 / (1 + e^(-2u)), out of the same exponential. Beyond 10 the slope
// is 0 or 1 in float32, and x is held there.
inline Gelu gelu_and_slope(Vec x) {
    const Vec above = max(broadcast(-10.0f), x), held = min(broadcast(10.0f), above), squared = held * held;
    const Vec c = broadcast(2 * 0.7978845608028654f), cube = broadcast(2 * 0.7978845608028654f * 0.044715f);
    const Vec e = exp(zero() - held * fma(squared, cube, c));
    const Vec s = broadcast(1.0f) / (broadcast(1.0f) + e);
    return {above * s, fma(held * s * (e * s), fma(squared * broadcast(3.0f), cube, c), s)};
}

// y[r, c] = gelu(x[r, c] + bias[c]); x, y: [rows, cols] contiguous, y may be x; bias: [cols] or null.
inline void bias_gelu(const float* x, const float* bias, float* y, int64_t rows, int64_t cols, int threads) {
    parallel_for(rows * cols, 16384, threads, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end;) {  // one stretch of one row at a time
            const int64_t col = i % cols, n = min(end - i, cols - col);
            for_each_vec(n, [&](int64_t c, int64_t part) {
                const Vec v = load_part(x + i + c, part);
                store_part(y + i + c, gelu(bias ? v + load_part(bias + col + c, part) : v), part);
            });
            i += n;
        }
    });
}

// dx = dy gelu'(x + bias) and, where set, dbias = its sum over the rows; [rows, cols] contiguous, dx may be dy.
inline void bias_gelu_backward(const float* dy, const float* x, const float* bias, float* dx, float* dbias,
                               int64_t rows, int64_t cols, int threads) {
    in_team(rows * cols < 16384 ? 1 : threads, nullptr, 0, [&](Team& team) {
        // Without a bias a row may be all there is: shared out by stretches of it.
        const int64_t total = rows * cols, stretch = bias ? cols : 4096;
        team.share_rows((total + stretch - 1) / stretch, [&](int64_t i) {
            const int64_t at = i * stretch;
            for_each_vec(min(stretch, total - at), [&](int64_t c, int64_t n) {
                const Vec v = load_part(x + at + c, n);
                const Vec slope = gelu_and_slope(bias ? v + load_part(bias + c, n) : v).slope;
                store_part(dx + at + c, load_part(dy + at + c, n) * slope, n);
            });
        });
        if (dbias) column_sums(team, dx, cols, rows, cols, dbias);
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
