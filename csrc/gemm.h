// The engine of every linear layer's products: y = act(x W^T + bias) + residual in float32, from the live weight.
//
// Three ways to do it, chosen by the number of rows and by how W lies:
//   dots    few rows, W row-major (torch's own layout). Dot products along K: every element of W is read once, in
//           place, and the time is that of reading W. Four rows of W against up to six rows of x stay in registers.
//   stream  few rows, W column-major (the book's weight loader leaves such parameters). Eight rows of W^T at a time
//           are read along and added into y, which stays in the cache.
//   tiles   many rows. W is rearranged block by block into panels of kPanel columns that stay in the L2 cache; tiles of
//           eight rows of x are multiplied with them, and bias, GELU and residual follow while the sums are in L1. The
//           next block is fetched meanwhile. The block goes with the call: nothing of W outlives it.
//
// The same serves backward: the gradient of x is a product with W read the other way round, that of W a product of two
// activations of which the first is read the other way round too, which only tiles can do.
//
// The order of the sums depends on m, k and the layouts, never on what other rows hold, on the threads or on the tails,
// so results repeat bit for bit. Nothing is read or written past the end of a row. k is at least 1.
#pragma once

#include "gelu.h"
#include "vec.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// What follows the sum. kGelu: y = gelu(sum), and the sum itself into pre where that is set. kGeluBackward: y = sum *
// gelu'(pre), and gelu(pre) into act where that is set.
enum Epilogue { kPlain, kGelu, kGeluBackward };

// An operand of rows x columns: element (i, j) at at[i * row + j * col]; one of the two strides is 1.
struct Matrix {
    const float* at;
    int64_t row, col;
};

// y[m, n] = epilogue(x[m, k] w[n, k]^T + bias + residual).
struct Product {
    Matrix x, w;
    float* y;  // rows y_row apart
    int64_t y_row, m, n, k;
    const float* bias = nullptr;      // [n]
    const float* residual = nullptr;  // [m, n], rows residual_row apart; may be y itself
    int64_t residual_row = 0;
    Epilogue epilogue = kPlain;  // another one not together with residual
    float* pre = nullptr;        // [m, n], rows y_row apart, like act
    float* act = nullptr;
};

constexpr bool kWide = Vec::registers == 32;
constexpr int kVecs = kWide ? 3 : 2;  // a tile is kTileRows x kVecs registers of sums
constexpr int kTileRows = kWide ? 8 : 6;
constexpr int kPanel = kVecs * Vec::width;        // columns of y a tile covers
constexpr int64_t kBlockK = 768;                  // depth of a packed block
constexpr int64_t kBlockFloats = 48 * kBlockK;    // its size: 144 KB, so that the next one fits beside it in L2
constexpr int64_t kBlockM = 1024;                 // rows of x swept per packed block
constexpr int64_t kTransposedM = 512;             // .. where x lies the other way round and is rearranged too
constexpr int64_t kChain = 64;                    // products added up in one register before they join the sum so far
constexpr int kDotRows = kWide ? 6 : 3;           // a dot tile: rows of x ..
constexpr int kDotCols = 4;                       // .. and rows of W
constexpr int64_t kDotChunk = 64;                 // columns between two epilogues of the dots
constexpr int64_t kDotDepth = 768;                // depth over which up to eight rows of x stay in the L1 cache
constexpr int64_t kMaxDotM = kWide ? 16 : 64;     // rows of x up to which dots are used
constexpr int kStreamRows = 8;                    // rows of a column-major W taken together ..
constexpr int kStreamVecs = kWide ? 2 : 1;        // .. and registers of each
constexpr int64_t kStreamCols = 1024;             // columns of y summed up side by side ..
constexpr int64_t kStreamRow = kStreamCols + 16;  // .. in rows that do not fall on each other in the cache
constexpr int64_t kStreamDepth = 128;             // .. and products in one sum before it joins y
constexpr int64_t kStreamAhead = 256;             // floats between what is used and what is fetched
constexpr int64_t kMaxStreamM = 24;               // rows of x up to which a column-major W is streamed
// Floats of scratch a thread, and what a product with x read the other way round needs on top.
constexpr int64_t kProductScratch = kBlockFloats + kTileRows * kPanel + kDotChunk * kMaxDotM;
constexpr int64_t kTransposedScratch = (kTransposedM + 2 * kTileRows) * kBlockK;
constexpr int64_t product_scratch(bool transposed) { return kProductScratch + (transposed ? kTransposedScratch : 0); }

// One row of sums over a part of K, n of them, into y: bias and residual join with the first part, the epilogue with
// the last.
static void finish_row(const Product& p, const float* sums, int64_t row, int64_t col, int64_t n, bool first_part,
                       bool last_part) {
    const int64_t at = row * p.y_row + col;
    float *y = p.y + at, *pre = p.pre ? p.pre + at : nullptr, *act = p.act ? p.act + at : nullptr;
    const float* bias = first_part && p.bias ? p.bias + col : nullptr;
    const float* more = !first_part ? y : p.residual ? p.residual + row * p.residual_row + col : nullptr;
    const Epilogue epilogue = last_part ? p.epilogue : kPlain;
    for_each_vec(n, [&](int64_t j, int64_t c) {
        Vec v = load_part(sums + j, c);
        if (bias) v = v + load_part(bias + j, c);
        if (more) v = v + load_part(more + j, c);
        if (epilogue == kGelu) {
            if (pre) store_part(pre + j, v, c);
            v = gelu(v);
        } else if (epilogue == kGeluBackward) {
            const Gelu g = gelu_and_slope(load_part(pre + j, c));
            if (act) store_part(act + j, g.value, c);
            v = v * g.slope;
        }
        store_part(y + j, v, c);
    });
}

// ---------------------------------------------------------------------------------------------------- dots

// sums[i * kDotChunk + j] (+)= x_i . w_j for MR rows of x and four rows of W, over k. Meanwhile `fetch` lines a step
// (0, 1, 2 or 4) are read into the cache: from `ahead` on, ahead_line apart, ahead_step from step to step.
template <int MR>
inline void dot_tile(int64_t k, const float* x, int64_t x_row, const float* const (&w)[kDotCols], const float* ahead,
                     int64_t ahead_line, int64_t ahead_step, int fetch, float* sums, bool add) {
    Vec sum[MR][kDotCols];
    FASTGPT_UNROLL
    for (int i = 0; i < MR; i++) FASTGPT_UNROLL
    for (int j = 0; j < kDotCols; j++) sum[i][j] = zero();
    const float *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
    int64_t whole = k - k % Vec::width, kk = 0;
    for (; kk < whole; kk += Vec::width) {
        if (fetch > 0) FASTGPT_PREFETCH(ahead);
        if (fetch > 1) FASTGPT_PREFETCH(ahead + ahead_line);
        if (fetch > 2) {
            FASTGPT_PREFETCH(ahead + 2 * ahead_line);
            FASTGPT_PREFETCH(ahead + 3 * ahead_line);
        }
        ahead += ahead_step;
        Vec xi[MR];
        FASTGPT_UNROLL
        for (int i = 0; i < MR; i++) xi[i] = load(x + i * x_row + kk);
        FASTGPT_UNROLL
        for (int j = 0; j < kDotCols; j++) {
            Vec wj = load((j == 0 ? w0 : j == 1 ? w1 : j == 2 ? w2 : w3) + kk);
            FASTGPT_UNROLL
            for (int i = 0; i < MR; i++) sum[i][j] = fma(xi[i], wj, sum[i][j]);
        }
    }
    if (kk < k) {
        FASTGPT_UNROLL
        for (int j = 0; j < kDotCols; j++) {
            Vec wj = load((j == 0 ? w0 : j == 1 ? w1 : j == 2 ? w2 : w3) + kk, k - kk);
            FASTGPT_UNROLL
            for (int i = 0; i < MR; i++) sum[i][j] = fma(load(x + i * x_row + kk, k - kk), wj, sum[i][j]);
        }
    }
    FASTGPT_UNROLL
    for (int i = 0; i < MR; i++) {
        float four[kDotCols];
        float* to = sums + i * kDotChunk;
        sum4(sum[i][0], sum[i][1], sum[i][2], sum[i][3], add ? four : to);
        if (add) FASTGPT_UNROLL
        for (int j = 0; j < kDotCols; j++) to[j] += four[j];
    }
}

typedef void (*DotKernel)(int64_t, const float*, int64_t, const float* const (&)[kDotCols], const float*, int64_t,
                          int64_t, int, float*, bool);
static const DotKernel dots_by_rows[] = {dot_tile<1>,
                                         dot_tile<2>,
                                         dot_tile<3>,
                                         dot_tile<(kWide ? 4 : 1)>,
                                         dot_tile<(kWide ? 5 : 1)>,
                                         dot_tile<(kWide ? 6 : 1)>};

// W row-major, m <= kMaxDotM.
static void dots(const Product& p, float* workspace) {
    float* sums = workspace;  // [m, kDotChunk]
    int64_t groups = up(p.m, kDotRows), depth = p.m <= 2 ? 1 << 30 : p.m <= 8 ? kDotDepth : kDotDepth / 2;
    // The next four rows of W are fetched while these are used: as one stream where they follow each other in memory
    // and one pass over x does it all, else side by side, shared out among the passes.
    int fetch = groups == 1 ? 4 : groups <= 3 ? 2 : 1;
    bool stream = groups == 1 && p.w.row == p.k && p.k <= depth;
    int64_t ahead_line = stream ? 16 : p.w.row, ahead_step = stream ? 64 : 16;
    for (int64_t n0 = 0; n0 < p.n; n0 += kDotChunk) {
        int64_t cols = min(kDotChunk, p.n - n0);
        for (int64_t k0 = 0; k0 < p.k; k0 += depth) {  // x over this depth stays in the L1 cache
            int64_t k = min(depth, p.k - k0);
            for (int64_t j = 0; j < cols; j += kDotCols) {
                const float* w[kDotCols];  // rows past the end repeat the last: computed, never stored
                for (int i = 0; i < kDotCols; i++) w[i] = p.w.at + min(n0 + j + i, p.n - 1) * p.w.row + k0;
                const float* ahead = w[0] + kDotCols * p.w.row;
                if (j + kDotCols >= cols) ahead = k0 + depth < p.k ? p.w.at + n0 * p.w.row + k0 + depth : ahead - k0;
                for (int64_t g = 0, m0 = 0; g < groups; g++) {
                    int64_t m1 = p.m * (g + 1) / groups;
                    dots_by_rows[m1 - m0 - 1](k, p.x.at + m0 * p.x.row + k0, p.x.row, w, ahead + g * fetch * p.w.row,
                                              ahead_line, ahead_step, g * fetch < kDotCols ? fetch : 0,
                                              sums + m0 * kDotChunk + j, k0 > 0);
                    m0 = m1;
                }
            }
        }
        for (int64_t i = 0; i < p.m; i++) finish_row(p, sums + i * kDotChunk, i, n0, cols, true, true);
    }
}

// --------------------------------------------------------------------------------------------------- tiles

// sums[i * kPanel + j] = x_i . panel column j for MR rows of x and VECS registers of columns, over k, in chains of
// kChain. PACKED: x is [k,
// kTileRows], else rows x_row apart. Meanwhile one line from `ahead` on is read into the cache for each step of k, with
// a jump after each `run` of them.
template <int MR, int VECS, bool PACKED>
static void tile(int64_t k, const float* x, int64_t x_row, const float* panel, const float* ahead, int64_t run,
                 int64_t jump, float* sums) {
    const float* xp[(MR + 2) / 3];  // every third row: the two between are reached by index
    FASTGPT_UNROLL
    for (int g = 0; g < (MR + 2) / 3; g++) xp[g] = x + 3 * g * x_row;
    int64_t left = run;
    for (int64_t k0 = 0; k0 < k; k0 += kChain) {
        Vec sum[MR][VECS];
        FASTGPT_UNROLL
        for (int i = 0; i < MR; i++) FASTGPT_UNROLL
        for (int v = 0; v < VECS; v++) sum[i][v] = zero();
        for (int64_t steps = min(kChain, k - k0); steps > 0;) {
            int64_t piece = min(steps, left);
            steps -= piece, left -= piece;
            for (; piece > 0; piece--) {
                FASTGPT_PREFETCH(ahead);
                ahead += 16;
                Vec w[VECS];
                FASTGPT_UNROLL
                for (int v = 0; v < VECS; v++) w[v] = load(panel + v * Vec::width);
                panel += kPanel;
                FASTGPT_UNROLL
                for (int i = 0; i < MR; i++) {
                    Vec xi = broadcast(PACKED ? x[i] : xp[i / 3][(i % 3) * x_row]);
                    FASTGPT_UNROLL
                    for (int v = 0; v < VECS; v++) sum[i][v] = fma(xi, w[v], sum[i][v]);
                }
                if (PACKED) {
                    x += kTileRows;
                    continue;
                }
                FASTGPT_UNROLL
                for (int g = 0; g < (MR + 2) / 3; g++) {
                    xp[g]++;
                    FASTGPT_KEEP(xp[g]);  // else the compiler keeps one pointer a row and spills them
                }
            }
            if (left == 0) left = run, ahead += jump;
        }
        FASTGPT_UNROLL
        for (int i = 0; i < MR; i++) FASTGPT_UNROLL
        for (int v = 0; v < VECS; v++) {
            float* to = sums + i * kPanel + v * Vec::width;
            store(to, k0 ? sum[i][v] + load(to) : sum[i][v]);
        }
    }
}

typedef void (*TileKernel)(int64_t, const float*, int64_t, const float*, const float*, int64_t, int64_t, float*);
template <int VECS, bool PACKED>
static const TileKernel tiles_by_rows[] = {tile<1, VECS, PACKED>,
                                           tile<2, VECS, PACKED>,
                                           tile<3, VECS, PACKED>,
                                           tile<4, VECS, PACKED>,
                                           tile<5, VECS, PACKED>,
                                           tile<6, VECS, PACKED>,
                                           tile<(kWide ? 7 : 1), VECS, PACKED>,
                                           tile<(kWide ? 8 : 1), VECS, PACKED>};

// The kernel for so many rows of x and columns of a panel: a last panel is rarely full.
FASTGPT_INLINE TileKernel tile_for(int64_t rows, int64_t cols, bool packed) {
    const TileKernel* by_rows = cols > 2 * Vec::width
                                    ? (packed ? tiles_by_rows<kVecs, true> : tiles_by_rows<kVecs, false>)
                                : cols > Vec::width ? (packed ? tiles_by_rows<2, true> : tiles_by_rows<2, false>)
                                                    : (packed ? tiles_by_rows<1, true> : tiles_by_rows<1, false>);
    return by_rows[rows - 1];
}

// panel[kk * kPanel + j] = W[n0 + j][k0 + kk]; columns past the end are zero.
static void pack_panel(const Product& p, int64_t n0, int64_t k0, int64_t k, float* panel) {
    int64_t cols = min(kPanel, p.n - n0);
    if (p.w.row == 1) {
        const float* w = p.w.at + n0 + k0 * p.w.col;
        for (int64_t kk = 0; kk < k; kk++) FASTGPT_UNROLL
        for (int v = 0; v < kVecs; v++) {
            int64_t c = cols - v * Vec::width;
            store(panel + kk * kPanel + v * Vec::width, c >= Vec::width ? load(w + kk * p.w.col + v * Vec::width)
                                                        : c > 0         ? load(w + kk * p.w.col + v * Vec::width, c)
                                                                        : zero());
        }
        return;
    }
    for (int v = 0; v < kVecs; v++)
        transpose_rows(p.w.at + (n0 + v * Vec::width) * p.w.row + k0, p.w.row, cols - v * Vec::width, k,
                       panel + v * Vec::width, kPanel);
}

// packed[(i / kTileRows * k + kk) * kTileRows + i % kTileRows] = x[i * 1 + kk * x_col] for m rows; rows past the end of
// the last group are whatever was there: computed, never stored.
static void pack_transposed(const float* x, int64_t x_col, int64_t m, int64_t k, float* packed) {
    constexpr int64_t kGroups = 8;  // streams written side by side
    for (int64_t i0 = 0; i0 < m; i0 += kGroups * kTileRows)
        for (int64_t kk = 0; kk < k; kk++)
            for (int64_t i = i0; i < min(m, i0 + kGroups * kTileRows); i += kTileRows)
                if (i + kTileRows <= m)
                    std::memcpy(packed + i * k + kk * kTileRows, x + i + kk * x_col, sizeof(float) * kTileRows);
                else
                    for (int64_t r = 0; r < m - i; r++) packed[i * k + kk * kTileRows + r] = x[i + r + kk * x_col];
}

// Any m, any layout.
static void tiles(const Product& p, float* workspace) {
    float *packed = workspace, *sums = workspace + kBlockFloats, *packed_x = workspace + kProductScratch;
    const bool column_major = p.w.row == 1, transposed = p.x.col != 1;
    // A weight's gradient sums over rows, in parts of about one depth; a forward product's parts are as they always
    // were.
    int64_t depth = transposed ? up(p.k, up(p.k, kBlockK)) : min(kBlockK, p.k);
    int64_t width = kBlockFloats / (depth * kPanel) * kPanel, blocks_m = up(p.m, transposed ? kTransposedM : kBlockM);
    for (int64_t b = 0; b < blocks_m; b++) {
        // On whole tiles: packed groups of rows start anew with each block.
        const int64_t tiles_m = up(p.m, kTileRows);
        const int64_t m0 = tiles_m * b / blocks_m * kTileRows, m1 = min(tiles_m * (b + 1) / blocks_m * kTileRows, p.m);
        for (int64_t k0 = 0; k0 < p.k; k0 += depth) {
            const int64_t k = min(depth, p.k - k0);
            if (transposed) pack_transposed(p.x.at + m0 + k0 * p.x.col, p.x.col, m1 - m0, k, packed_x);
            for (int64_t n0 = 0; n0 < p.n; n0 += width) {
                int64_t n1 = min(n0 + width, p.n), next = min(width, p.n - n1);
                for (int64_t n = n0; n < n1; n += kPanel) pack_panel(p, n, k0, k, packed + (n - n0) * k);
                // The next block's part of W is fetched meanwhile: `runs` pieces of `run` lines, ahead_row apart.
                const float* ahead = p.w.at + n1 * p.w.row + k0 * p.w.col;
                int64_t ahead_row = column_major ? p.w.col : p.w.row, run = up(column_major ? next : k, 16);
                int64_t runs = next <= 0 ? 0 : column_major ? k : next;
                for (int64_t m = m0; m < m1; m += kTileRows)
                    for (int64_t n = n0; n < n1; n += kPanel) {
                        int64_t rows = min(kTileRows, m1 - m);
                        const float* panel = packed + (n - n0) * k;
                        const float* x = transposed ? packed_x + (m - m0) * k : p.x.at + m * p.x.row + k0;
                        bool fetch = runs > 0;
                        tile_for(rows, min(kPanel, n1 - n), transposed)(k, x, p.x.row, panel, fetch ? ahead : panel,
                                                                        fetch ? run : k,
                                                                        fetch ? ahead_row - run * 16 : 0, sums);
                        if (fetch) ahead += k / run * ahead_row, runs -= k / run;
                        for (int64_t i = 0; i < rows; i++)
                            finish_row(p, sums + i * kPanel, m + i, n, min(kPanel, n1 - n), k0 == 0, k0 + k == p.k);
                    }
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------- stream

// G rows of W from k0 on by a few registers from column n on, times every row of x, into sums[i * kStreamRow + n - n0]:
// stored where `fresh`, else added.
template <int G, bool Full>
FASTGPT_INLINE void stream_block(const Product& p, int64_t k0, int64_t n, const float* ahead, float* sums, bool fresh) {
    Vec w[G][kStreamVecs];
    FASTGPT_UNROLL
    for (int g = 0; g < G; g++) FASTGPT_UNROLL
    for (int v = 0; v < kStreamVecs; v++) {
        const float* from = p.w.at + (k0 + g) * p.w.col + n + v * Vec::width;
        int64_t c = p.n - n - v * Vec::width;
        w[g][v] = Full ? load(from) : c > 0 ? load(from, min(c, Vec::width)) : zero();
        if (Full) FASTGPT_PREFETCH(ahead + g * p.w.col + v * Vec::width);
    }
    for (int64_t i = 0; i < p.m; i++, sums += kStreamRow) {
        const float* x = p.x.at + i * p.x.row + k0;
        Vec sum[kStreamVecs];
        FASTGPT_UNROLL
        for (int v = 0; v < kStreamVecs; v++) sum[v] = zero();
        FASTGPT_UNROLL
        for (int g = 0; g < G; g++) FASTGPT_UNROLL
        for (int v = 0; v < kStreamVecs; v++) sum[v] = fma(broadcast(x[g]), w[g][v], sum[v]);
        FASTGPT_UNROLL
        for (int v = 0; v < kStreamVecs; v++) {
            float* to = sums + v * Vec::width;
            store(to, fresh ? sum[v] : load(to) + sum[v]);
        }
    }
}

template <int G>
static void stream_rows(const Product& p, int64_t k0, int64_t n0, int64_t n1, float* sums, bool fresh) {
    constexpr int64_t step = kStreamVecs * Vec::width;
    int64_t n = n0;
    for (; n + step <= n1; n += step) {
        const float* ahead = p.w.at + k0 * p.w.col + n + kStreamAhead;
        if (n + kStreamAhead >= n1) ahead += G * p.w.col - (n1 - n0);  // the start of the next rows
        stream_block<G, true>(p, k0, n, ahead, sums + n - n0, fresh);
    }
    if (n < n1) stream_block<G, false>(p, k0, n, nullptr, sums + n - n0, fresh);
}

// W column-major, m <= kMaxStreamM.
static void stream(const Product& p, float* workspace) {
    float* sums = workspace;  // [m, kStreamRow]
    for (int64_t n0 = 0; n0 < p.n; n0 += kStreamCols) {
        int64_t n1 = min(n0 + kStreamCols, p.n);
        for (int64_t k0 = 0; k0 < p.k; k0 += kStreamDepth) {
            int64_t k1 = min(k0 + kStreamDepth, p.k), k = k0;
            for (; k + kStreamRows <= k1; k += kStreamRows) stream_rows<kStreamRows>(p, k, n0, n1, sums, k == k0);
            for (; k < k1; k++) stream_rows<1>(p, k, n0, n1, sums, k == k0);
            for (int64_t i = 0; i < p.m; i++) finish_row(p, sums + i * kStreamRow, i, n0, n1 - n0, k0 == 0, k1 == p.k);
        }
    }
}

// ------------------------------------------------------------------------------------------------- product

enum Way { kDots, kTiles, kStream };

inline Way way_for(const Product& p) {
    if (p.x.col != 1) return kTiles;
    if (p.w.col == 1) return p.m <= kMaxDotM ? kDots : kTiles;
    return p.m <= kMaxStreamM ? kStream : kTiles;
}

// Part `part` of `parts` of a product, into its own columns and rows of y: nothing is shared, so there is no barrier
// inside, and the bits do not depend on `parts`. With more parts than threads the parts may be handed out as threads
// get free. The workspace, kProductScratch floats and kTransposedScratch where x is read the other way round, belongs
// to the calling thread.
[[maybe_unused]] static void run_product(const Product& whole, int64_t part, int64_t parts, float* workspace) {
    Product p = whole;
    Way way = way_for(p);
    int64_t panels = up(p.n, kPanel), tiles_m = up(p.m, kTileRows), parts_m = 1, best = -1;
    // A row of tiles costs about as much as packing its panel, and as packing its rows of x where those lie the other
    // way.
    for (int64_t d = 1; way == kTiles && d <= parts; d++) {
        int64_t rows = up(tiles_m, d), cost = up(panels, parts / d) * (rows + 1) + (p.x.col != 1 ? rows : 0);
        if (parts % d == 0 && (best < 0 || cost < best)) best = cost, parts_m = d;
    }
    int64_t parts_n = parts / parts_m, pn = part % parts_n, pm = part / parts_n;
    int64_t n0 = panels * pn / parts_n * kPanel, n1 = min(panels * (pn + 1) / parts_n * kPanel, p.n);
    int64_t m0 = tiles_m * pm / parts_m * kTileRows, m1 = min(tiles_m * (pm + 1) / parts_m * kTileRows, p.m);
    if (n0 >= n1 || m0 >= m1) return;
    p.m = m1 - m0, p.n = n1 - n0;
    p.x.at += m0 * p.x.row;
    p.w.at += n0 * p.w.row;
    p.y += m0 * p.y_row + n0;
    if (p.pre) p.pre += m0 * p.y_row + n0;
    if (p.act) p.act += m0 * p.y_row + n0;
    if (p.bias) p.bias += n0;
    if (p.residual) p.residual += m0 * p.residual_row + n0;
    if (way == kDots)
        dots(p, workspace);
    else if (way == kTiles)
        tiles(p, workspace);
    else
        stream(p, workspace);
}

static_assert(kBlockK % kChain == 0 && kStreamDepth % kStreamRows == 0, "the parts of K fit each other");
static_assert(kProductScratch >= kStreamRow * kMaxStreamM && kStreamCols % (kStreamVecs * Vec::width) == 0, "sums fit");

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
