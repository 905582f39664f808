// One transformer block, by a team of threads that share each phase and meet at a barrier between phases. The whole
// pass without gradients (forward.h) and a block of a training step run the same code: one keeps nothing and works in
// place, the other keeps what its backward reads.
#pragma once

#include "attend_row.h"
#include "causal_attention.h"
#include "dropout.h"
#include "kernels.h"
#include "layer_norm.h"
#include "linear.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int64_t kFewQueries = 8;  // up to which a row at a time beats packing the keys

// What a block reads and writes beside its weights; rows are batch * tokens.
struct BlockRun {
    int64_t batch, tokens, past, capacity, width, heads, head_dim;
    const float* x;  // [rows, width]: the residual stream in
    float* middle;   // .. after the attention; may be x
    float* y;        // .. out; may be middle
    float* qkv;      // [rows, qkv_row]: query, key and value side by side
    int64_t qkv_row;
    float* context;  // [rows, width]: the heads' outputs; may be h without dropout
    float* act;      // [rows, act_row]: the feed-forward's middle; may be qkv where nothing is kept
    int64_t act_row;
    float* h;  // [rows, width]: scratch
    // What a backward pass reads, or null: of the softmax, as causal_attention keeps it, of the norms, [rows], and the
    // feed-forward's middle before its GELU, rows act_row apart.
    float *softmax, *mean1, *rstd1, *mean2, *rstd2, *pre;
    Dropout drop_attention, drop_shortcut1, drop_shortcut2;
    int64_t cache_format;
    bool narrow_sums;  // as Product has it

    int64_t rows() const { return batch * tokens; }
    float scale() const { return 1.0f / sqrtf(static_cast<float>(head_dim)); }
    // Floats of each thread's scratch: the largest of what the phases need.
    static int64_t scratch(int64_t keys, int64_t head_dim) {
        return up(max(product_scratch(true), max(keys + 16, AttentionWorkspace::floats(keys, head_dim))), 16) * 16;
    }
};

// Appends the tokens' keys and values to the cache, [batch, heads, capacity, head_dim] each.
inline void cache_row(const BlockRun& r, const Block& b, int64_t row) {
    const int64_t batch = row / r.tokens, token = r.past + row % r.tokens;
    const float *key = r.qkv + row * r.qkv_row + r.width, *value = key + r.width;
    for (int64_t h = 0; h < r.heads; ++h) {
        const int64_t at = ((batch * r.heads + h) * r.capacity + token) * r.head_dim, from = h * r.head_dim;
        for_each_vec(r.head_dim, [&](int64_t c, int64_t n) {
            store(r.cache_format, b.key_cache, at + c, load_part(key + from + c, n), n);
            store(r.cache_format, b.value_cache, at + c, load_part(value + from + c, n), n);
        });
    }
}

// Attention of every head, from the query columns of qkv into context; k and v from there or from the cache. pairs:
// whether many queries may be multiplied as bfloat16.
template <class KV>
inline void attend(Team& team, const BlockRun& r, const KV* k, const KV* v, bool cached, [[maybe_unused]] bool pairs) {
    const int64_t T = r.tokens, D = r.head_dim, keys = r.past + T;
    const int64_t kv_token = cached ? D : r.qkv_row, kv_head = cached ? r.capacity * D : D;
    const int64_t kv_batch = cached ? r.heads * r.capacity * D : T * r.qkv_row;
    if (T > kFewQueries || r.softmax || r.drop_attention.on()) {
        const AttentionShape s{r.batch, r.heads,  T,        keys,    D,        T * r.qkv_row, D, r.qkv_row, kv_batch,
                               kv_head, kv_token, kv_batch, kv_head, kv_token, T * r.width,   D, r.width};
#ifdef FASTGPT_NARROW_DOTS
        // A backward pass takes the scores anew, in float32.
        if (pairs && !r.softmax)
            return share_attention<Pairs>(team, r.qkv, k, v, r.context, nullptr, r.scale(), s, r.drop_attention);
#endif
        return share_attention<Single>(team, r.qkv, k, v, r.context, r.softmax, r.scale(), s, r.drop_attention);
    }
    team.share_range(r.batch * r.heads, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t batch = unit / r.heads, head = unit % r.heads, kv = batch * kv_batch + head * kv_head;
            for (int64_t t = 0; t < T; ++t)
                attend_row(r.qkv + (batch * T + t) * r.qkv_row + head * D, k + kv, kv_token, v + kv, kv_token,
                           r.past + t + 1, D, r.scale(), team.scratch,
                           r.context + (batch * T + t) * r.width + head * D);
        }
    });
}

inline void block_forward(Team& team, const BlockRun& r, const Block& b, float eps) {
    const int64_t M = r.rows(), D = r.width;
    const auto norm = [&](const float* x, const Numbers& scale, const Numbers& shift, float* mean, float* rstd) {
        team.share_rows(M, [&](int64_t i) {
            norm_row(x + i * D, scale, shift, r.h + i * D, D, eps, mean ? mean + i : nullptr,
                     rstd ? rstd + i : nullptr);
        });
    };
    const auto product = [&](const Linear& w, const float* x, int64_t x_row, float* y, int64_t y_row) {
        Product p = forward_product(w, x, x_row, M, y, y_row);
        p.narrow_sums = r.narrow_sums;
        return p;
    };
    // y = residual + dropout(x W^T + bias); the branch goes through h where something is dropped.
    const auto shortcut = [&](const Linear& w, const float* x, int64_t x_row, const float* residual, float* y,
                              const Dropout& drop) {
        Product p = product(w, x, x_row, drop.on() ? r.h : y, D);
        if (!drop.on()) p.residual = residual, p.residual_row = D;
        share(team, p);
        team.barrier();
        if (drop.on()) team.share_rows(M, [&](int64_t i) { drop.row(i, r.h + i * D, residual + i * D, y + i * D, D); });
    };
    norm(r.x, b.scale1, b.shift1, r.mean1, r.rstd1);
    share(team, product(b.query, r.h, D, r.qkv, r.qkv_row));
    share(team, product(b.key, r.h, D, r.qkv + D, r.qkv_row));
    share(team, product(b.value, r.h, D, r.qkv + 2 * D, r.qkv_row));
    team.barrier();
    if (b.key_cache) team.share_rows(M, [&](int64_t i) { cache_row(r, b, i); });
    const bool pairs = r.cache_format == kBFloat16 || b.query.weight.format >= kInt8;
    if (b.key_cache)
        as_type(r.cache_format, b.key_cache, [&](const auto* keys) {
            attend(team, r, keys, static_cast<decltype(keys)>(b.value_cache), true, pairs);
        });
    else
        attend(team, r, r.qkv + D, r.qkv + 2 * D, false, pairs);
    team.barrier();
    shortcut(b.out_proj, r.context, D, r.x, r.middle, r.drop_shortcut1);
    norm(r.middle, b.scale2, b.shift2, r.mean2, r.rstd2);
    Product up = product(b.up, r.h, D, r.act, r.act_row);
    up.epilogue = kGelu, up.pre = r.pre;
    share(team, up);
    team.barrier();
    shortcut(b.down, r.act, r.act_row, r.middle, r.y, r.drop_shortcut2);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
