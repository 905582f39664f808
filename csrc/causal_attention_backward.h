// The gradients of causal attention from what was kept of the softmax, tile by tile (FlashAttention-2, Dao, arXiv
// 2307.08691): with P = exp(scale q k^T - greatest) / sum, M the dropout's factors and delta = rowsum(dout * out),
//     dv = (P * M)^T dout,  dS = P * (M * (dout v^T) - delta) scale,  dq = dS k,  dk = dS^T q.
//
// One unit of work is a share of the key tiles of one head. It owns those tiles' dk and dv; dq it gathers in a block of
// its own, and where a head has several shares these are added up in order: the same bits each time, no atomics.
#pragma once

#include "causal_attention.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int64_t kAttentionUnits = 32;  // at least so many, where there are tiles enough

struct AttentionBackward {
    const float *q, *k, *v, *out, *dout;
    const float* softmax;
    float *dq, *dk, *dv;
    float scale;
    AttentionShape s;  // of q, k, v and out
    AttentionShape d;  // of dq, dk, dv and dout
    Dropout drop;

    // The same for any number of threads: the sums of dq depend on it.
    int64_t shares() const {
        const int64_t heads = s.batch * s.heads, tiles = (s.keys + kKeyTile - 1) / kKeyTile;
        return min(tiles, up(kAttentionUnits, heads));
    }
    // Floats of what a thread has for itself, and of what the threads have together.
    static int64_t scratch(int64_t head_dim) { return kKeyTile * (4 * head_dim + 2 * kQueryTile) + 2 * kQueryTile; }
    int64_t shared() const { return s.batch * s.heads * s.queries * (1 + s.head_dim * shares()) + 16; }
};

// The weights and the gradient of the scores of one row from its scores and dout v^T, in place: n keys are seen, the
// rest of the tile becomes 0. Where the row has no other tile (`alone`) delta is summed up from just these weights, so
// that it cancels what it is to cancel.
inline void softmax_backward_row(float* score, float* dweight, int64_t n, float scale, const float* softmax,
                                 float delta, const float* keep, bool alone) {
    const Vec top = broadcast(-softmax[0]), norm = broadcast(1.0f / softmax[1]), s = broadcast(scale);
    Vec sums = zero();
    for (int64_t j = 0; j < kKeyTile; j += Vec::width) {
        const int64_t c = min(Vec::width, n - j);
        const Vec seen = load(score + j), dp = load(dweight + j);
        if (c < Vec::width) store(score + j, zero()), store(dweight + j, zero());
        if (c <= 0) continue;
        store_part(score + j, exp(seen * s + top) * norm, c);  // rounded as forward does, not once
        store_part(dweight + j, keep ? dp * load(keep + j) : dp, c);
        if (alone) sums = fma(load(score + j), load(dweight + j), sums);
    }
    const Vec d = broadcast(alone ? sum(sums) : delta);
    for (int64_t j = 0; j < n; j += Vec::width) {
        const Vec p = load(score + j);
        store(dweight + j, p * (load(dweight + j) - d) * s);
        if (keep) store(score + j, p * load(keep + j));
    }
}

// One tile of keys of one head against every query that sees it. dq is [queries, head_dim] and is added to.
inline void attend_tile_backward(const AttentionBackward& a, int64_t batch, int64_t h, int64_t tile, const float* delta,
                                 float* dq, float* scratch) {
    const AttentionShape &s = a.s, &d = a.d;
    const int64_t D = s.head_dim, past = s.keys - s.queries, first = tile * kKeyTile, head = batch * s.heads + h;
    const int64_t n_keys = min(kKeyTile, s.keys - first);
    const float* q = a.q + batch * s.q_batch + h * s.q_head;
    const float* k = a.k + batch * s.k_batch + h * s.k_head + first * s.k_token;
    const float* v = a.v + batch * s.v_batch + h * s.v_head + first * s.v_token;
    const float* dout = a.dout + batch * d.o_batch + h * d.o_head;
    float *keys = scratch, *values = keys + D * kKeyTile, *dk = values + D * kKeyTile, *dv = dk + D * kKeyTile;
    float *scores = dv + D * kKeyTile, *dweights = scores + kQueryTile * kKeyTile;
    for (int64_t j = 0; j < kKeyTile; j += kGroupCols) {
        pack_keys<Single>(k + min(j, n_keys - 1) * s.k_token, s.k_token, max(0, n_keys - j), D, keys + j * D);
        pack_keys<Single>(v + min(j, n_keys - 1) * s.v_token, s.v_token, max(0, n_keys - j), D, values + j * D);
    }
    std::memset(dk, 0, sizeof(float) * static_cast<size_t>(2 * D * kKeyTile));
    for (int64_t i0 = max(0, first - past); i0 < s.queries; i0 += kQueryTile) {
        const int64_t rows = min(kQueryTile, s.queries - i0);
        for (int64_t j = 0; j < n_keys; j += kGroupCols) {
            attention_product<false>(q + i0 * s.q_token, s.q_token, keys + j * D, kGroupCols, scores + j, kKeyTile,
                                     rows, kGroupCols, D);
            attention_product<false>(dout + i0 * d.o_token, d.o_token, values + j * D, kGroupCols, dweights + j,
                                     kKeyTile, rows, kGroupCols, D);
        }
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t row = head * s.queries + i0 + i;
            float keep[kDropoutGroup];
            if (a.drop.on()) a.drop.factors(row, tile, keep);
            softmax_backward_row(scores + i * kKeyTile, dweights + i * kKeyTile, min(n_keys, past + i0 + i + 1 - first),
                                 a.scale, a.softmax + 2 * row, delta[i0 + i], a.drop.on() ? keep : nullptr,
                                 past + i0 + i < kKeyTile);
        }
        attention_product<true, true>(scores, kKeyTile, dout + i0 * d.o_token, d.o_token, dv, D, n_keys, D, rows);
        attention_product<true, true>(dweights, kKeyTile, q + i0 * s.q_token, s.q_token, dk, D, n_keys, D, rows);
        attention_product<true>(dweights, kKeyTile, k, s.k_token, dq + i0 * D, D, rows, D, n_keys);
    }
    const size_t bytes = sizeof(float) * static_cast<size_t>(D);
    for (int64_t j = 0; j < n_keys; ++j) {
        std::memcpy(a.dk + batch * d.k_batch + h * d.k_head + (first + j) * d.k_token, dk + j * D, bytes);
        std::memcpy(a.dv + batch * d.v_batch + h * d.v_head + (first + j) * d.v_token, dv + j * D, bytes);
    }
}

// By a team; shared: AttentionBackward::shared floats. Ends with a barrier.
inline void attention_backward(Team& team, const AttentionBackward& a, float* shared) {
    const AttentionShape &s = a.s, &d = a.d;
    const int64_t heads = s.batch * s.heads, T = s.queries, D = s.head_dim, shares = a.shares();
    const int64_t tiles = (s.keys + kKeyTile - 1) / kKeyTile;
    float *delta = shared, *dq = shared + heads * T;  // [heads, T], [heads, shares, T, D]
    team.share_rows(heads * T, [&](int64_t row) {
        const int64_t b = row / (s.heads * T), h = row / T % s.heads, t = row % T;
        const float* o = a.out + b * s.o_batch + h * s.o_head + t * s.o_token;
        const float* g = a.dout + b * d.o_batch + h * d.o_head + t * d.o_token;
        Vec sums = zero();
        for_each_vec(D, [&](int64_t c, int64_t n) { sums = fma(load_part(o + c, n), load_part(g + c, n), sums); });
        delta[row] = sum(sums);
    });
    team.share_range(heads * shares, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t head = unit / shares;
            float* own = dq + unit * T * D;
            std::memset(own, 0, sizeof(float) * static_cast<size_t>(T * D));
            for (int64_t t = unit % shares; t < tiles; t += shares)
                attend_tile_backward(a, head / s.heads, head % s.heads, t, delta + head * T, own, team.scratch);
        }
    });
    team.barrier();
    team.share_rows(heads * T, [&](int64_t row) {
        const int64_t head = row / T, b = head / s.heads, h = head % s.heads, t = row % T;
        float* to = a.dq + b * d.q_batch + h * d.q_head + t * d.q_token;
        const float* own = dq + (head * shares * T + t) * D;
        for_each_vec(D, [&](int64_t c, int64_t n) {
            Vec total = load_part(own + c, n);
            for (int64_t i = 1; i < shares; ++i) total = total + load_part(own + i * T * D + c, n);
            store_part(to + c, total, n);
        });
    });
}

// As causal_attention in causal_attention.h; `g` has the strides of dq, dk, dv and dout. False if the workspace
// could not be had; nothing is written then.
inline bool causal_attention_backward(const float* q, const float* k, const float* v, const float* out,
                                      const float* dout, const float* softmax, float* dq, float* dk, float* dv,
                                      float scale, const AttentionShape& s, const AttentionShape& g, int64_t seed,
                                      double dropout_p, int threads) {
    const Dropout drop(seed, dropout_p, s.keys);
    const AttentionBackward a{q, k, v, out, dout, softmax, dq, dk, dv, scale, s, g, drop};
    const double work = static_cast<double>(s.batch * s.heads * s.queries) * static_cast<double>(s.keys * s.head_dim);
    const int64_t parts = work < 2e5 ? 1 : threads, own = up(AttentionBackward::scratch(s.head_dim), 16) * 16;
    void* block = std::malloc(sizeof(float) * static_cast<size_t>(parts * own + a.shared() + 16));
    if (!block) return false;
    float* memory = aligned(static_cast<float*>(block));
    in_team(parts, memory, own, [&](Team& team) { attention_backward(team, a, memory + parts * own); });
    std::free(block);
    return true;
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
