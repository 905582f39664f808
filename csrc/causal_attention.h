// Causal attention, tiled, with the softmax taken online: FlashAttention-2 (Dao, arXiv 2307.08691) for a CPU's caches.
//
// One unit of work is a share of the query tiles of one head. It keeps the head's keys transposed in panels of
// kGroupCols keys (packed as far as the unit has come, so once a unit), a tile of scores, and a tile of outputs;
// no block of queries x keys exists. Query i sees the keys up to i + keys - queries.
#pragma once

#include <math.h>

#include <cstdlib>

#include "attention_product.h"
#include "dropout.h"
#include "numbers.h"
#include "parallel.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int kQueryTile = 8 * kGroupRows;
constexpr int kKeyTile = 64;
static_assert(kKeyTile % kGroupCols == 0, "a tile of keys holds whole panels");
static_assert(kKeyTile == kDropoutGroup, "a tile of keys is one group of the generator's numbers");

struct AttentionWorkspace {
    float* scores;                              // [kQueryTile, kKeyTile]
    float* out;                                 // [kQueryTile, head_dim]
    float* values;                              // [kKeyTile, head_dim], where they are not read in place
    float* queries;                             // [kQueryTile, head_dim] as units, likewise
    float* keys;                                // [ceil(keys / kGroupCols), head_dim, kGroupCols]
    float top[kQueryTile], weight[kQueryTile];  // running maximum and sum of each row

    AttentionWorkspace(float* memory, int64_t head_dim)
        : scores(memory),
          out(scores + kQueryTile * kKeyTile),
          values(out + kQueryTile * head_dim),
          queries(values + kKeyTile * head_dim),
          keys(queries + kQueryTile * unit_row(head_dim)) {}
    static int64_t floats(int64_t n_keys, int64_t head_dim) {
        const int64_t panels = (n_keys + kGroupCols - 1) / kGroupCols;
        return panels * head_dim * kGroupCols + kQueryTile * (kKeyTile + head_dim) + kKeyTile * head_dim +
               kQueryTile * unit_row(head_dim);
    }
};

// panel[u, j] = unit u of k[j] for n keys; the columns past n are zero, so that their scores are finite until masked.
template <class A, class KV>
inline void pack_keys(const KV* k, int64_t stride, int64_t n, int64_t head_dim, float* panel) {
    constexpr int64_t whole = Vec::width * A::in_unit;
    const auto units = [&](int64_t key, int64_t u, int64_t numbers) {
        WeightRow<KV> row;
        row.at = k + key * stride;
        return numbers >= whole ? A::units(row, u * A::in_unit) : A::units(row, u * A::in_unit, numbers);
    };
    for (int64_t j = 0; j < kGroupCols; j += Vec::width)
        transpose_rows(
            n - j, units_of<A>(head_dim), panel + j, kGroupCols,
            [&](int64_t i, int64_t u) { return units(j + i, u, head_dim - u * A::in_unit); },
            [&](int64_t i, int64_t u, int64_t) { return units(j + i, u, head_dim - u * A::in_unit); });
}

// Turns the scores of one row into weights: the first n of them count, the rest become 0, as far as a group of
// rows reads. Rescales what the row has gathered so far to the new maximum.
inline void online_softmax(float* score, int64_t n, float scale, float& top, float& weight, float* out,
                           int64_t head_dim) {
    const int64_t width = min(kKeyTile, (n + kGroupRows + Vec::width - 2) / Vec::width * Vec::width);
    for (int64_t j = 0; j < width; j += Vec::width) store(score + j, load(score + j) * broadcast(scale));
    for (int64_t j = n; j < width; ++j) score[j] = -INFINITY;
    Vec high = broadcast(-INFINITY);
    for (int64_t j = 0; j < width; j += Vec::width) high = max(high, load(score + j));
    const float seen = largest(high), next = seen > top ? seen : top;
    const Vec base = broadcast(next > -INFINITY ? next : 0.0f);  // a tile of nothing but -infinity weighs 0
    Vec total = zero();
    for (int64_t j = 0; j < width; j += Vec::width) {
        const Vec p = exp(load(score + j) - base);
        store(score + j, p);
        total = total + p;
    }
    if (next != top) {
        if (top > -INFINITY) {  // not before the first tile, where nothing has been gathered
            const float shrink = expf(top - next);
            weight *= shrink;
            for (int64_t d = 0; d < head_dim; ++d) out[d] *= shrink;
        }
        top = next;
    }
    weight += sum(total);
}

// n values of head_dim as rows of units: of float32 in place where they are that.
template <class A, class KV>
inline const float* values_as_units(const KV* v, int64_t& stride, int64_t n, int64_t head_dim, float* values) {
    if constexpr (A::in_unit == 1 && same<KV, float>) {
        return v;
    } else {
        for (int64_t i = 0; i < n; i += A::in_unit)
            for_each_vec(head_dim, [&](int64_t d, int64_t c) {
                store_part(values + i / A::in_unit * head_dim + d,
                           A::column_units(v + i * stride + d, stride, n - i, c), c);
            });
        stride = head_dim;
        return values;
    }
}

// The queries [first, first + rows) of one head; packed is how many keys of it are packed already.
template <class A, class KV>
inline void attend_tile(const float* q, const KV* k, const KV* v, float* o, float* softmax, float scale,
                        const AttentionShape& s, const Dropout& drop, int64_t head, int64_t first, int64_t rows,
                        int64_t& packed, AttentionWorkspace& w) {
    const int64_t D = s.head_dim, units = units_of<A>(D), past = s.keys - s.queries, visible = past + first + rows;
    for (; packed < visible; packed += kGroupCols)
        pack_keys<A>(k + packed * s.k_token, s.k_token, min(kGroupCols, s.keys - packed), D, w.keys + packed * units);
    const float* queries = q + first * s.q_token;
    int64_t q_token = s.q_token;
    if (A::in_unit > 1) {
        q_token = unit_row(units);
        for (int64_t i = 0; i < rows; ++i)
            prepare_row<A>(q + (first + i) * s.q_token, D, 1.0f, w.queries + i * q_token);
        queries = w.queries;
    }
    std::memset(w.out, 0, sizeof(float) * static_cast<size_t>(rows * D));
    for (int64_t i = 0; i < rows; ++i) w.top[i] = -INFINITY, w.weight[i] = 0.0f;

    for (int64_t key = 0; key < visible; key += kKeyTile) {
        // Rows whose last visible key lies before this tile have nothing here.
        const int64_t skip = max(0, key - past - first);
        const int64_t n = min(kKeyTile, visible - key);
        for (int64_t j = 0; j < n; j += kGroupCols)
            for (int64_t i = skip; i < rows; i += kGroupRows)
                attention_product<false, false, A>(queries + i * q_token, q_token, w.keys + (key + j) * units,
                                                   kGroupCols, w.scores + i * kKeyTile + j, kKeyTile,
                                                   min(kGroupRows, rows - i), kGroupCols, units);
        for (int64_t i = skip; i < rows; ++i)
            online_softmax(w.scores + i * kKeyTile, min(n, past + first + i + 1 - key), scale, w.top[i], w.weight[i],
                           w.out + i * D, D);
        // Dropout falls on the weights, their sum is that of all.
        for (int64_t i = skip; i < rows && drop.on(); ++i)
            drop.group(head * s.queries + first + i, key / kKeyTile, w.scores + i * kKeyTile,
                       min(n, past + first + i + 1 - key));
        int64_t v_token = s.v_token;
        const float* const values = values_as_units<A>(v + key * s.v_token, v_token, n, D, w.values);
        for (int64_t i = skip; i < rows; i += kGroupRows) {
            const int64_t group = min(kGroupRows, rows - i), seen = min(n, past + first + i + group - key);
            if (A::in_unit > 1)  // in place
                for (int64_t r = i; r < i + group; ++r)
                    prepare_row<A>(w.scores + r * kKeyTile, seen, 1.0f, w.scores + r * kKeyTile);
            attention_product<true, false, A>(w.scores + i * kKeyTile, kKeyTile, values, v_token, w.out + i * D, D,
                                              group, D, units_of<A>(seen));
        }
    }
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t d = 0; d < D; ++d) o[(first + i) * s.o_token + d] = w.out[i * D + d] / w.weight[i];
        if (softmax) softmax[2 * (first + i)] = w.top[i], softmax[2 * (first + i) + 1] = w.weight[i];
    }
}

// The attention by a team; each thread's scratch: AttentionWorkspace::floats.
template <class A, class KV>
inline void share_attention(Team& team, const float* q, const KV* k, const KV* v, float* out, float* softmax,
                            float scale, const AttentionShape& s, const Dropout& drop) {
    const int64_t heads = s.batch * s.heads, tiles = (s.queries + kQueryTile - 1) / kQueryTile;
    // Shares a head among several units only where heads alone would leave threads idle.
    const int64_t wanted = Team::kPieces * team.parts, shares = heads >= wanted ? 1 : min(tiles, up(wanted, heads));
    AttentionWorkspace w(team.scratch, s.head_dim);
    const auto attend = [&](int64_t unit) {
        const int64_t head = unit / shares, b = head / s.heads, h = head % s.heads;
        int64_t packed = 0;
        for (int64_t t = unit % shares; t < tiles; t += shares)
            attend_tile<A>(q + b * s.q_batch + h * s.q_head, k + b * s.k_batch + h * s.k_head,
                           v + b * s.v_batch + h * s.v_head, out + b * s.o_batch + h * s.o_head,
                           softmax ? softmax + 2 * head * s.queries : nullptr, scale, s, drop, head, t * kQueryTile,
                           min(kQueryTile, s.queries - t * kQueryTile), packed, w);
    };
    team.share_range(heads * shares, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) attend(unit);
    });
}

// q, out: [batch, heads, queries, head_dim], k, v: [batch, heads, keys, head_dim] by the strides in the shape;
// softmax: [batch, heads, queries, 2] contiguous or null, each row's greatest score and its sum of exponentials.
inline bool causal_attention(const float* q, const float* k, const float* v, float* out, float* softmax, float scale,
                             const AttentionShape& s, int64_t seed, double dropout_p, int threads) {
    const Dropout drop(seed, dropout_p, s.keys);
    const int64_t rows = s.batch * s.heads * s.queries;
    if (rows == 0) return true;
    const bool small = static_cast<double>(rows) * static_cast<double>(s.keys * s.head_dim) < 5e5;
    const int64_t parts = small ? 1 : threads;
    const int64_t floats = (AttentionWorkspace::floats(s.keys, s.head_dim) + 15) / 16 * 16;
    void* block = std::malloc(sizeof(float) * static_cast<size_t>(parts * floats + 16));
    if (!block) return false;
    float* memory = aligned(static_cast<float*>(block));
    in_team(parts, memory, floats,
            [&](Team& team) { share_attention<Single>(team, q, k, v, out, softmax, scale, s, drop); });
    std::free(block);
    return true;
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
