// The tanh GELU, with an optional bias in front (Hendrycks and Gimpel, arXiv 1606.08415).
// 0.5 x (1 + tanh u) = x / (1 + e^(-2u)) with u = sqrt(2/pi) (x + 0.044715 x^3): one exponential, no cancellation
// for negative x, and the limits come out of the arithmetic (e^(-2u) reaches infinity, the quotient 0).
#pragma once

#include "layer_norm.h"

namespace fastgpt {
namespace FASTGPT_ISA {

inline Vec gelu(Vec x) {
    const Vec u2 = x * fma(x * x, broadcast(-2 * 0.7978845608028654f * 0.044715f), broadcast(-2 * 0.7978845608028654f));
    return x / (broadcast(1.0f) + exp(u2));
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

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
