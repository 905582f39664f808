// Attention of one query at a time: for few queries, where packing keys into panels would cost more than it saves.
#pragma once

#include <math.h>

#include "numbers.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// Scores of one query against n keys, then the weighted sum of values. scores: n floats of scratch.
template <class KV>
inline void attend_row(const float* q, const KV* k, int64_t k_token, const KV* v, int64_t v_token, int64_t n,
                       int64_t head_dim, float scale, float* scores, float* out) {
    float top = -INFINITY;
    for (int64_t j = 0; j < n; j += 4) {
        const KV* row[4];  // past the end the last key is repeated: computed, never used
        for (int i = 0; i < 4; ++i) row[i] = k + min(j + i, n - 1) * k_token;
        Vec sums[4] = {zero(), zero(), zero(), zero()};
        for (int64_t d = 0; d < head_dim; d += Vec::width) {
            const int64_t c = min(Vec::width, head_dim - d);
            const Vec x = load(q + d, c);
            for (int i = 0; i < 4; ++i) sums[i] = fma(x, load(row[i] + d, c), sums[i]);
        }
        float four[4];
        sum4(sums[0], sums[1], sums[2], sums[3], four);
        for (int64_t i = 0; i < min(4, n - j); ++i) {
            scores[j + i] = four[i] * scale;
            top = scores[j + i] > top ? scores[j + i] : top;
        }
    }
    const Vec base = broadcast(top > -INFINITY ? top : 0.0f);
    Vec total = zero();
    for (int64_t j = 0; j < n; j += Vec::width) {
        const int64_t c = min(Vec::width, n - j);
        store(scores + j, exp(load(scores + j, c) - base), c);
        total = total + load(scores + j, c);
    }
    const Vec weight = broadcast(1.0f / sum(total));
    constexpr int VECS = 4;
    for (int64_t d = 0; d < head_dim; d += VECS * Vec::width) {
        const int64_t cols = min(VECS * Vec::width, head_dim - d);
        Vec acc[VECS] = {zero(), zero(), zero(), zero()};
        for (int64_t j = 0; j < n; ++j) {
            const Vec p = broadcast(scores[j]);
            for (int i = 0; i < VECS; ++i) {
                const int64_t c = min(Vec::width, cols - i * Vec::width);
                if (c > 0) acc[i] = fma(p, load(v + j * v_token + d + i * Vec::width, c), acc[i]);
            }
        }
        for (int i = 0; i < VECS; ++i) {
            const int64_t c = min(Vec::width, cols - i * Vec::width);
            if (c > 0) store(out + d + i * Vec::width, acc[i] * weight, c);
        }
    }
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
