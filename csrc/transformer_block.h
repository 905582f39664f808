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
    bool narrow_sums;           // as Product has it
    const Sequence* sequences;  // as Forward has it, with the number of this block
    int64_t n_sequences, layer;

    int64_t rows() const { return batch * tokens; }
    int64_t count() const { return sequences ? n_sequences : batch; }
    Sequence sequence(int64_t i) const {
        return sequences ? sequences[i] : Sequence{i * tokens, tokens, past, capacity, nullptr};
    }
    int64_t last_row(int64_t i) const { return sequence(i).first + sequence(i).tokens - 1; }
    // Which sequence a row belongs to.
    int64_t sequence_of(int64_t row) const {
        if (!sequences) return row / tokens;
        int64_t low = 0, high = n_sequences;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (sequences[middle].first <= row ? low : high) = middle;
        }
        return low;
    }
    bool cached(const Block& b) const { return (sequences ? sequences[0].cache : b.key_cache) != nullptr; }
    // The keys, or the values, of a sequence in the cache.
    void* cache_of(const Block& b, int64_t i, bool values) const {
        const Sequence s = sequence(i);
        const int64_t of_layer = heads * s.capacity * head_dim;
        if (!sequences) return moved(values ? b.value_cache : b.key_cache, bytes(cache_format, i * of_layer));
        return moved(s.cache, bytes(cache_format, (2 * layer + values) * of_layer));
    }
    float scale() const { return 1.0f / sqrtf(static_cast<float>(head_dim)); }
    // Floats of each thread's scratch: the largest of what the phases need.
    static int64_t scratch(int64_t keys, int64_t head_dim) {
        return up(max(product_scratch(true), max(keys + 16, AttentionWorkspace::floats(keys, head_dim))), 16) * 16;
    }
};

// A row's key and value as a cache would give them back.
inline void round_row(const BlockRun& r, int64_t row) {
    float* key = r.qkv + row * r.qkv_row + r.width;
    for_each_vec(2 * r.width, [&](int64_t c, int64_t n) {
        float narrow[Vec::width];  // in whatever format
        store(r.cache_format, narrow, 0, load_part(key + c, n), n);
        store_part(key + c, load(Numbers{narrow, r.cache_format}, 0, n), n);
    });
}

// Appends a row's key and value to its sequence's cache.
inline void cache_row(const BlockRun& r, const Block& b, int64_t row) {
    const int64_t i = r.sequence_of(row);
    const Sequence s = r.sequence(i);
    void *keys = r.cache_of(b, i, false), *values = r.cache_of(b, i, true);
    const float *key = r.qkv + row * r.qkv_row + r.width, *value = key + r.width;
    for (int64_t h = 0; h < r.heads; ++h) {
        const int64_t at = (h * s.capacity + s.past + row - s.first) * r.head_dim, from = h * r.head_dim;
        for_each_vec(r.head_dim, [&](int64_t c, int64_t n) {
            store(r.cache_format, keys, at + c, load_part(key + from + c, n), n);
            store(r.cache_format, values, at + c, load_part(value + from + c, n), n);
        });
    }
}

// Keys and values of a sequence, and their strides.
template <class KV>
struct KeysValues {
    const KV *k, *v;
    int64_t batch, head, token;
};

// They lie in the cache, or beside the queries in qkv.
template <class KV>
inline KeysValues<KV> keys_values(const BlockRun& r, const Block& b, int64_t i) {
    const Sequence s = r.sequence(i);
    if (r.cached(b)) {
        const int64_t head = s.capacity * r.head_dim;
        return {static_cast<const KV*>(r.cache_of(b, i, false)), static_cast<const KV*>(r.cache_of(b, i, true)),
                r.heads * head, head, r.head_dim};
    }
    if constexpr (same<KV, float>) {
        const float* k = r.qkv + s.first * r.qkv_row + r.width;
        return {k, k + r.width, s.tokens * r.qkv_row, r.head_dim, r.qkv_row};
    }
    return {};
}

// The tiled attention of as many sequences of one length, from sequence i on.
template <class KV>
inline void attend_tiled(Team& team, const BlockRun& r, const Block& b, int64_t i, int64_t batch,
                         [[maybe_unused]] bool pairs) {
    const Sequence s = r.sequence(i);
    const KeysValues<KV> kv = keys_values<KV>(r, b, i);
    const float* q = r.qkv + s.first * r.qkv_row;
    float* out = r.context + s.first * r.width;
    const int64_t T = s.tokens, D = r.head_dim;
    const AttentionShape shape{batch,   r.heads,  T,        s.past + T, D,        T * r.qkv_row, D, r.qkv_row, kv.batch,
                               kv.head, kv.token, kv.batch, kv.head,    kv.token, T * r.width,   D, r.width};
#ifdef FASTGPT_NARROW_DOTS
    // A backward pass takes the scores anew, in float32.
    if (pairs && !r.softmax)
        return share_attention<Pairs>(team, q, kv.k, kv.v, out, nullptr, r.scale(), shape, r.drop_attention);
#endif
    share_attention<Single>(team, q, kv.k, kv.v, out, r.softmax, r.scale(), shape, r.drop_attention);
}

// Attention of every head, from the query columns of qkv into context, over keys of KV. pairs: whether many queries may
// be multiplied as bfloat16.
template <class KV>
inline void attend(Team& team, const BlockRun& r, const Block& b, const KV*, bool pairs) {
    const bool few_at_once = b.query.weight.alike;
    const auto tiled = [&](const Sequence& s) {
        return (s.tokens > kFewQueries && !few_at_once) || r.softmax || r.drop_attention.on();
    };
    if (!r.sequences && tiled(r.sequence(0))) return attend_tiled<KV>(team, r, b, 0, r.batch, pairs);
    for (int64_t i = 0; r.sequences && i < r.n_sequences; ++i)
        if (tiled(r.sequence(i))) attend_tiled<KV>(team, r, b, i, 1, pairs);
    team.share_range(r.count() * r.heads, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t i = unit / r.heads, head = unit % r.heads;
            const Sequence s = r.sequence(i);
            if (tiled(s)) continue;
            const KeysValues<KV> kv = keys_values<KV>(r, b, i);
            for (int64_t t = 0; t < s.tokens; ++t)
                attend_row(r.qkv + (s.first + t) * r.qkv_row + head * r.head_dim, kv.k + head * kv.head, kv.token,
                           kv.v + head * kv.head, kv.token, s.past + t + 1, r.head_dim, r.scale(), team.scratch,
                           r.context + (s.first + t) * r.width + head * r.head_dim);
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
    const bool pairs = r.cache_format == kBFloat16 || b.query.weight.format >= kInt8;
    const bool cached = r.cached(b);
    if (cached) team.share_rows(M, [&](int64_t i) { cache_row(r, b, i); });
    const bool rounds = !cached && b.query.weight.alike && r.cache_format != kFloat32;
    if (rounds) team.share_rows(M, [&](int64_t i) { round_row(r, i); });
    as_type(cached ? r.cache_format : kFloat32, nullptr, [&](const auto* type) { attend(team, r, b, type, pairs); });
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
