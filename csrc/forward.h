// The whole model in one call, without gradients: embeddings, blocks, final norm and head in one parallel region,
// from the live parameters. The threads share each phase by rows, by columns of a product or by heads, and meet at
// a barrier between phases; a workspace of the caller's holds everything in between.
#pragma once

#include "causal_attention.h"
#include "kernels.h"
#include "linear.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int64_t kFewQueries = 8;  // up to which a row at a time beats packing the keys

// Scores of one query against n keys, then the weighted sum of values. For few queries, where packing keys into
// panels would cost more than it saves. scores: n floats of scratch.
inline void attend_row(const float* q, const float* k, int64_t k_token, const float* v, int64_t v_token, int64_t n,
                       int64_t head_dim, float scale, float* scores, float* out) {
    float top = -INFINITY;
    for (int64_t j = 0; j < n; j += 4) {
        const float* row[4];  // past the end the last key is repeated: computed, never used
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

struct ForwardScratch {
    // Floats of each thread's scratch: the largest of what the phases need.
    static int64_t per_thread(const Forward& f) {
        const int64_t keys = f.past + f.tokens;
        const int64_t attention = max(keys + 16, AttentionWorkspace::floats(keys, f.head_dim));
        return (max(kLinearScratch, attention) + 15) / 16 * 16;
    }
    // The widest of a row's intermediate values: query, key and value side by side, or the feed-forward's middle.
    static int64_t wide(const Forward& f) { return max(3 * f.width, f.hidden); }
};

// Floats of workspace that forward needs for this many threads.
inline int64_t forward_workspace(const Forward& f, int threads) {
    return f.batch * f.tokens * (f.width + ForwardScratch::wide(f)) + threads * ForwardScratch::per_thread(f) + 32;
}

inline void embed_row(const Forward& f, int64_t row) {
    const int64_t id = f.wide_ids ? static_cast<const int64_t*>(f.ids)[row] : static_cast<const int32_t*>(f.ids)[row];
    const float *token = f.tok_emb + id * f.width, *position = f.pos_emb + (f.past + row % f.tokens) * f.width;
    for_each_vec(f.width, [&](int64_t c, int64_t n) {
        store(f.x + row * f.width + c, load(token + c, n) + load(position + c, n), n);
    });
}

// Appends the tokens' keys and values to the cache, [batch, heads, capacity, head_dim] each.
inline void cache_row(const Forward& f, const Block& b, const float* wide, int64_t row) {
    const int64_t batch = row / f.tokens, token = f.past + row % f.tokens;
    const size_t bytes = sizeof(float) * static_cast<size_t>(f.head_dim);
    for (int64_t h = 0; h < f.heads; ++h) {
        const int64_t at = ((batch * f.heads + h) * f.capacity + token) * f.head_dim;
        std::memcpy(b.key_cache + at, wide + f.width + h * f.head_dim, bytes);
        std::memcpy(b.value_cache + at, wide + 2 * f.width + h * f.head_dim, bytes);
    }
}

// Attention of every head, from the query columns of wide into h; keys and values from there or from the cache.
inline void attend(const Forward& f, const Block& b, const float* wide, int64_t wide_row, float* h, float* scratch,
                   int64_t part, int64_t parts) {
    const int64_t T = f.tokens, D = f.head_dim, keys = f.past + T;
    const bool cached = b.key_cache != nullptr;
    const float *k = cached ? b.key_cache : wide + f.width, *v = cached ? b.value_cache : wide + 2 * f.width;
    const int64_t kv_token = cached ? D : wide_row, kv_head = cached ? f.capacity * D : D;
    const int64_t kv_batch = cached ? f.heads * f.capacity * D : T * wide_row;
    const AttentionShape s{f.batch, f.heads,  T,        keys,    D,        T * wide_row, D, wide_row, kv_batch,
                           kv_head, kv_token, kv_batch, kv_head, kv_token, T * f.width,  D, f.width};
    const float scale = 1.0f / sqrtf(static_cast<float>(D));
    if (T > kFewQueries) return attention_share(wide, k, v, h, nullptr, scale, s, scratch, part, parts);
    for (int64_t unit = part; unit < f.batch * f.heads; unit += parts) {
        const int64_t batch = unit / f.heads, head = unit % f.heads, kv = batch * kv_batch + head * kv_head;
        for (int64_t t = 0; t < T; ++t)
            attend_row(wide + (batch * T + t) * wide_row + head * D, k + kv, kv_token, v + kv, kv_token, f.past + t + 1,
                       D, scale, scratch, h + (batch * T + t) * f.width + head * D);
    }
}

// ids in range, sizes and addresses right: fastgpt/cpu/forward.py has checked them.
inline void forward(const Forward& f, const Block* blocks, float eps, int threads) {
    const int64_t M = f.batch * f.tokens, D = f.width, wide_row = ForwardScratch::wide(f);
    float* h = aligned(f.workspace);
    float* wide = h + M * D;
    float* scratches = aligned(wide + M * wide_row);
    const int64_t scratch_floats = ForwardScratch::per_thread(f);
    if (M == 0) return;

    Barrier meeting;
    parallel_region(threads, [&](int64_t part, int64_t parts) {
        const auto barrier = [&] { meeting.wait(parts); };
        float* scratch = scratches + part * scratch_floats;
        const auto share_rows = [&](int64_t rows, auto each) {
            for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) each(r);
            barrier();
        };
        const auto share_linear = [&](const Linear& w, const float* x, int64_t x_row, int64_t rows, float* y,
                                      int64_t y_row, const float* residual, bool gelu) {
            const LinearCall call{x,     x_row, w.weight, w.row, w.col, w.bias, residual,
                                  y_row, y,     y_row,    rows,  w.out, w.in,   gelu};
            product(call, static_cast<int>(part), static_cast<int>(parts), scratch);
        };
        const auto norm_rows = [&](const float* scale, const float* shift) {
            share_rows(M, [&](int64_t r) { norm_row(f.x + r * D, scale, shift, h + r * D, D, eps); });
        };

        if (f.ids) share_rows(M, [&](int64_t r) { embed_row(f, r); });
        for (const Block* b = blocks; b < blocks + f.n_blocks; ++b) {
            norm_rows(b->scale1, b->shift1);
            share_linear(b->query, h, D, M, wide, wide_row, nullptr, false);
            share_linear(b->key, h, D, M, wide + D, wide_row, nullptr, false);
            share_linear(b->value, h, D, M, wide + 2 * D, wide_row, nullptr, false);
            barrier();
            if (b->key_cache) share_rows(M, [&](int64_t r) { cache_row(f, *b, wide + r * wide_row, r); });
            attend(f, *b, wide, wide_row, h, scratch, part, parts);
            barrier();
            share_linear(b->out_proj, h, D, M, f.x, D, f.x, false);
            barrier();
            norm_rows(b->scale2, b->shift2);
            share_linear(b->up, h, D, M, wide, wide_row, nullptr, true);
            barrier();
            share_linear(b->down, wide, wide_row, M, f.x, D, f.x, false);
            barrier();
        }
        if (!f.out) return;
        const int64_t step = f.last_only ? f.tokens : 1, rows = M / step;
        float* last = f.head.weight ? h : f.out;
        share_rows(rows, [&](int64_t r) {
            norm_row(f.x + ((r + 1) * step - 1) * D, f.final_scale, f.final_shift, last + r * D, D, eps);
        });
        if (f.head.weight) share_linear(f.head, h, D, rows, f.out, f.head.out, nullptr, false);
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
