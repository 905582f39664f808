// The sum of token and position embeddings, with dropout, and its gradients.
#pragma once

#include "dropout.h"
#include "kernels.h"
#include "parallel.h"

namespace fastgpt {
namespace FASTGPT_ISA {

inline int64_t id_of(const Embedding& e, int64_t row) {
    return e.wide_ids ? static_cast<const int64_t*>(e.ids)[row] : static_cast<const int32_t*>(e.ids)[row];
}

inline Dropout dropout_of(const Embedding& e) { return {e.seed, e.dropout_p, e.width}; }

// y: [batch * tokens, width]; ids in range.
inline void embed_row(const Embedding& e, const Dropout& drop, int64_t row, float* y) {
    const float *token = e.tok_emb + id_of(e, row) * e.width,
                *position = e.pos_emb + (e.past + row % e.tokens) * e.width;
    y += row * e.width;
    for_each_vec(e.width, [&](int64_t c, int64_t n) {
        store_part(y + c, load_part(token + c, n) + load_part(position + c, n), n);
    });
    if (drop.on()) drop.row(row, y, nullptr, y, e.width);
}

inline void embedding(const Embedding& e, float* y, int threads) {
    const Dropout drop = dropout_of(e);
    parallel_for(e.batch * e.tokens, max(1, 65536 / max(1, e.width)), threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) embed_row(e, drop, r, y);
    });
}

// dtok: [vocab, width] and dpos: [context, width], written whole, or null. The threads share the columns, so that each
// sum is taken in the order of the tokens.
inline void embedding_backward(const Embedding& e, const float* dy, float* dtok, int64_t vocab, float* dpos,
                               int64_t context, int threads) {
    const int64_t D = e.width, groups = (D + kDropoutGroup - 1) / kDropoutGroup, rows = e.batch * e.tokens;
    const Dropout drop = dropout_of(e);
    const auto add = [&](int64_t first, int64_t last) {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t g = first; g < last; ++g) {
                float keep[kDropoutGroup];
                if (drop.on()) drop.factors(row, g, keep);
                const int64_t at = g * kDropoutGroup;
                float* token = dtok ? dtok + id_of(e, row) * D + at : nullptr;
                float* position = dpos ? dpos + (e.past + row % e.tokens) * D + at : nullptr;
                for_each_vec(min(kDropoutGroup, D - at), [&](int64_t c, int64_t n) {
                    Vec v = load_part(dy + row * D + at + c, n);
                    if (drop.on()) v = v * load(keep + c);
                    if (token) store_part(token + c, load_part(token + c, n) + v, n);
                    if (position) store_part(position + c, load_part(position + c, n) + v, n);
                });
            }
    };
    in_team(threads, nullptr, 0, [&](Team& team) {
        const auto clear = [&](float* to, int64_t n) {
            team.share_range(to ? n : 0, [&](int64_t begin, int64_t end) {
                std::memset(to + begin, 0, sizeof(float) * static_cast<size_t>(end - begin));
            });
        };
        clear(dtok, vocab * D);
        clear(dpos, context * D);
        team.barrier();
        team.share_range(groups, add);
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
