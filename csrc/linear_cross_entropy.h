// The cross entropy of a linear head without its logits: a chunk of rows at a time, logits, their log-sum-exp, and,
// where wanted, the gradients of the rows and of the weight out of the same chunk, for a known gradient of the losses.
#pragma once

#include "linear.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// The loss of one row; logits becomes its gradient, softmax minus one at the target, times `upstream`. A row whose
// target is ignored costs nothing and has gradient 0.
inline float cross_entropy_row(float* logits, int64_t n, int64_t target, int64_t ignore, bool backward,
                               float upstream) {
    if (target == ignore) {
        if (backward) std::memset(logits, 0, sizeof(float) * static_cast<size_t>(n));
        return 0.0f;
    }
    const auto part = [&](int64_t j, int64_t c) {  // lanes past the end are -infinity and weigh nothing
        if (c == Vec::width) return load(logits + j);
        float lanes[Vec::width];
        for (int64_t i = 0; i < Vec::width; ++i) lanes[i] = i < c ? logits[j + i] : -INFINITY;
        return load(lanes);
    };
    Vec high = broadcast(-INFINITY), total[2] = {zero(), zero()};
    for_each_vec(n, [&](int64_t j, int64_t c) { high = max(high, part(j, c)); });
    const float top = largest(high), at_target = logits[target];
    const Vec base = broadcast(top);
    for_each_vec(n, [&](int64_t j, int64_t c) {
        const Vec e = exp(part(j, c) - base);
        if (backward) store_part(logits + j, e, c);
        Vec& t = total[j / Vec::width % 2];
        t = t + e;
    });
    const float sums = sum(total[0] + total[1]);
    if (backward) {
        const Vec factor = broadcast(upstream / sums);
        for_each_vec(n, [&](int64_t j, int64_t c) { store_part(logits + j, load_part(logits + j, c) * factor, c); });
        logits[target] -= upstream;
    }
    return top - at_target + logf(sums);  // exact where the target's is near the greatest
}

constexpr int64_t kLossChunk = 512;  // rows whose logits exist at a time

inline int64_t linear_cross_entropy_workspace(int64_t rows, int64_t vocab, int threads) {
    return min(rows, kLossChunk) * vocab + threads * product_scratch(true) + 32;
}

// loss: [rows]. upstream: [rows], each loss's gradient, or null where nothing is wanted but the losses; dx may be null.
inline void linear_cross_entropy(const Linear& w, const float* x, const int64_t* targets, int64_t ignore, float* loss,
                                 const float* upstream, float* dx, const LinearGradient& to, int64_t rows,
                                 float* workspace, int threads) {
    float* logits = aligned(workspace);
    float* scratches = aligned(logits + min(rows, kLossChunk) * w.out);
    in_team(threads, scratches, product_scratch(true), [&](Team& team) {
        // Equal chunks, so that the last is no sliver: W is rearranged once a chunk.
        const int64_t chunks = up(rows, kLossChunk);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t r0 = rows * chunk / chunks, n = rows * (chunk + 1) / chunks - r0;
            share(team, forward_product(w, x + r0 * w.in, w.in, n, logits, w.out));
            team.barrier();
            team.share_rows(n, [&](int64_t i) {
                loss[r0 + i] = cross_entropy_row(logits + i * w.out, w.out, targets[r0 + i], ignore,
                                                 upstream != nullptr, upstream ? upstream[r0 + i] : 0.0f);
            });
            if (!upstream) continue;
            if (dx) share(team, input_gradient(w, logits, w.out, n, dx + r0 * w.in, w.in));
            LinearGradient chunk_to = to;
            chunk_to.bias = nullptr;
            share_parameter_gradients(team, chunk_to, logits, w.out, w.out, x + r0 * w.in, w.in, w.in, n,
                                      w.weight.format == kBFloat16, chunk > 0);
            team.barrier();
        }
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
