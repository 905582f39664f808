// The whole model in one call, without gradients: embeddings, blocks, final norm and head in one parallel region,
// from the live parameters. A workspace of the caller's holds everything in between.
#pragma once

#include "kernels.h"
#include "transformer_block.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// The widest of a row's intermediate values: query, key and value side by side, or the feed-forward's middle.
inline int64_t wide_row(const Forward& f) { return max(3 * f.width, f.hidden); }

// The most keys that a token sees.
inline int64_t most_keys(const Forward& f) {
    int64_t keys = f.sequences ? 0 : f.past + f.tokens;
    for (int64_t i = 0; f.sequences && i < f.n_sequences; ++i)
        keys = max(keys, f.sequences[i].past + f.sequences[i].tokens);
    return keys;
}

// Floats of workspace that forward needs for this many threads.
inline int64_t forward_workspace(const Forward& f, int threads) {
    return f.batch * f.tokens * (f.width + wide_row(f)) + threads * BlockRun::scratch(most_keys(f), f.head_dim) + 32;
}

inline void embed_row(const Forward& f, const Sequence& s, int64_t row) {
    const int64_t id = f.wide_ids ? static_cast<const int64_t*>(f.ids)[row] : static_cast<const int32_t*>(f.ids)[row];
    const int64_t position = (s.past + row - s.first) * f.width;
    with_rows(f.tok_emb, [&](auto type) {
        using T = decltype(type);
        const WeightRow<T> token(f.tok_emb, id);
        const float scale = has_row_scale(f.tok_emb) ? static_cast<const float*>(f.tok_emb.scale)[id] : 1.0f;
        for_each_vec(f.width, [&](int64_t c, int64_t n) {
            const Vec v = n == Vec::width ? token(c) : token(c, n);
            store(f.x + row * f.width + c, fma(v, broadcast(scale), load(f.pos_emb, position + c, n)), n);
        });
    });
}

// ids in range, sizes and addresses right: fastgpt/cpu/forward.py has checked them.
inline void forward(const Forward& f, const Block* blocks, float eps, int threads) {
    const int64_t M = f.batch * f.tokens, D = f.width;
    float* h = aligned(f.workspace);
    float* wide = h + M * D;
    float* scratches = aligned(wide + M * wide_row(f));
    const int64_t scratch = BlockRun::scratch(most_keys(f), f.head_dim);
    if (M == 0) return;

    BlockRun run{};
    run.batch = f.batch, run.tokens = f.tokens, run.past = f.past, run.capacity = f.capacity;
    run.width = D, run.heads = f.heads, run.head_dim = f.head_dim;
    run.cache_format = f.cache_format, run.narrow_sums = f.narrow_sums;
    run.sequences = f.sequences, run.n_sequences = f.n_sequences;
    run.x = run.middle = run.y = f.x;  // in place
    run.h = run.context = h;
    run.qkv = run.act = wide, run.qkv_row = run.act_row = wide_row(f);

    in_team(threads, scratches, scratch, [&](Team& team) {
        if (f.ids) team.share_rows(M, [&](int64_t r) { embed_row(f, run.sequence(run.sequence_of(r)), r); });
        for (int64_t layer = 0; layer < f.n_blocks; ++layer) {
            BlockRun of_layer = run;
            of_layer.layer = layer;
            block_forward(team, of_layer, blocks[layer], eps);
        }
        if (!f.out) return;
        const int64_t rows = f.last_only ? run.count() : M;
        team.share_rows(rows, [&](int64_t r) {
            const int64_t from = f.last_only ? run.last_row(r) : r;
            norm_row(f.x + from * D, f.final_scale, f.final_shift, h + r * D, D, eps);
            for_each_vec(f.head.weight.at ? 0 : D, [&](int64_t c, int64_t n) {
                store(f.result_format, f.out, r * D + c, load_part(h + r * D + c, n), n);
            });
        });
        if (!f.head.weight.at) return;
        Product p = forward_product(f.head, h, D, rows, f.out, f.head.out);
        p.y_format = f.result_format, p.narrow_sums = f.narrow_sums;
        share(team, p);
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
