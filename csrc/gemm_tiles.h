// Products of many rows, with operands in any layout. W is rearranged block by block into panels of kPanel columns that
// stay in the L2 cache; tiles of eight rows of x are multiplied with them, and what follows is done while the sums are
// in L1. The next block is fetched meanwhile. The block goes with the call: nothing of W outlives it.
#pragma once

#include "product.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// What a tile reads into the cache meanwhile: from `at` on the line at every `step` bytes, one for each step of k, with
// a jump of so many bytes after each `run` of them.
struct Ahead {
    const char* at;
    int64_t run, jump, step;
};

// sums[i * sums_row + j] = x_i . panel column j for MR rows of x and VECS registers of columns, over k units, in chains
// of kChain. PACKED: x is [k, kTileRows], else rows x_row apart.
template <class A, int MR, int VECS, bool PACKED>
static void tile(int64_t k, const float* x, int64_t x_row, const float* panel, const Ahead& next, float* sums,
                 int64_t sums_row) {
    const char* ahead = next.at;
    const int64_t run = next.run, jump = next.jump, step = kFetchAll ? next.step : 64;
    const float* xp[(MR + 2) / 3];  // every third row: the two between are reached by index
    FASTGPT_UNROLL
    for (int g = 0; g < (MR + 2) / 3; g++) xp[g] = x + 3 * g * x_row;
    int64_t left = run;
    for (int64_t k0 = 0; k0 < k; k0 += kChain) {
        typename A::Sum sum[MR][VECS];
        FASTGPT_UNROLL
        for (int i = 0; i < MR; i++) FASTGPT_UNROLL
        for (int v = 0; v < VECS; v++) sum[i][v] = A::nothing();
        for (int64_t steps = min(kChain, k - k0); steps > 0;) {
            int64_t piece = min(steps, left);
            steps -= piece, left -= piece;
            for (; piece > 0; piece--) {
                if (kFetchAll)
                    FASTGPT_PREFETCH_FAR(ahead);
                else
                    FASTGPT_PREFETCH(ahead);
                ahead += step;
                Vec w[VECS];
                FASTGPT_UNROLL
                for (int v = 0; v < VECS; v++) w[v] = load(panel + v * Vec::width);
                panel += kPanel;
                FASTGPT_UNROLL
                for (int i = 0; i < MR; i++) {
                    Vec xi = broadcast(PACKED ? x[i] : xp[i / 3][(i % 3) * x_row]);
                    FASTGPT_UNROLL
                    for (int v = 0; v < VECS; v++) sum[i][v] = A::add_product(sum[i][v], xi, w[v]);
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
            float* to = sums + i * sums_row + v * Vec::width;
            const Vec value = A::value(sum[i][v]);
            store(to, k0 ? value + load(to) : value);
        }
    }
}

typedef void (*TileKernel)(int64_t, const float*, int64_t, const float*, const Ahead&, float*, int64_t);
template <class A, int VECS, bool PACKED>
static const TileKernel tiles_by_rows[] = {tile<A, 1, VECS, PACKED>,
                                           tile<A, 2, VECS, PACKED>,
                                           tile<A, 3, VECS, PACKED>,
                                           tile<A, 4, VECS, PACKED>,
                                           tile<A, 5, VECS, PACKED>,
                                           tile<A, 6, VECS, PACKED>,
                                           tile<A, (kWide ? 7 : 1), VECS, PACKED>,
                                           tile<A, (kWide ? 8 : 1), VECS, PACKED>};

// The kernel for so many rows of x and columns of a panel: a last panel is rarely full.
template <class A, bool PACKED>
FASTGPT_INLINE TileKernel tile_for(int64_t rows, int64_t cols) {
    return (cols > 2 * Vec::width ? tiles_by_rows<A, kVecs, PACKED>
            : cols > Vec::width   ? tiles_by_rows<A, 2, PACKED>
                                  : tiles_by_rows<A, 1, PACKED>)[rows - 1];
}

// panel[u * kPanel + j] = unit u of W[n0 + j] from column k0 on, for k columns; rows past the end are zero.
template <class A, class T>
static void pack_panel(const Product& p, int64_t n0, int64_t k0, int64_t k, float* panel) {
    const int64_t cols = min(kPanel, p.n - n0);
    if constexpr (!quantised<T>) {
        if (p.w.row == 1) {  // column-major
            const T* w = static_cast<const T*>(p.w.at) + n0 + k0 * p.w.col;
            for (int64_t kk = 0; kk < k; kk += A::in_unit, w += A::in_unit * p.w.col, panel += kPanel) FASTGPT_UNROLL
            for (int v = 0; v < kVecs; v++) {
                const int64_t c = min(Vec::width, cols - v * Vec::width);
                store(panel + v * Vec::width, c > 0 ? A::column_units(w + v * Vec::width, p.w.col, k - kk, c) : zero());
            }
            return;
        }
    }
    for (int v = 0; v < kVecs; v++) {
        const int64_t n = n0 + v * Vec::width, rows = cols - v * Vec::width;
        WeightRow<T> w[Vec::width];  // rows past the end repeat the last: never read
        for (int j = 0; j < Vec::width; j++) w[j] = WeightRow<T>(p.w, min(n + j, p.n - 1));
        transpose_rows(
            rows, units_of<A>(k), panel + v * Vec::width, kPanel,
            [&](int64_t j, int64_t u) {
                const int64_t from = u * A::in_unit;
                return from + Vec::width * A::in_unit <= k ? A::units(w[j], k0 + from)
                                                           : A::units(w[j], k0 + from, k - from);
            },
            [&](int64_t j, int64_t u, int64_t) {
                return A::units(w[j], k0 + u * A::in_unit, min(k - u * A::in_unit, Vec::width * A::in_unit));
            });
    }
}

// packed[(i / kTileRows * units + u) * kTileRows + i % kTileRows] = unit u of row i of x, which lies column by column,
// x_col apart; rows past the end of the last group are whatever was there: computed, never stored.
template <class A>
static void pack_transposed(const float* x, int64_t x_col, int64_t m, int64_t k, float* packed) {
    constexpr int64_t kGroups = 8;  // streams written side by side
    const int64_t units = units_of<A>(k);
    for (int64_t i0 = 0; i0 < m; i0 += kGroups * kTileRows)
        for (int64_t u = 0; u < units; u++) {
            const float* column = x + u * A::in_unit * x_col;
            for (int64_t i = i0; i < min(m, i0 + kGroups * kTileRows); i += kTileRows) {
                float* to = packed + i * units + u * kTileRows;
                if constexpr (A::in_unit > 1) {
                    const int64_t rows = min(kTileRows, m - i);
                    store(to, A::column_units(column + i, x_col, k - u * A::in_unit, rows), rows);
                } else if (i + kTileRows <= m) {
                    std::memcpy(to, column + i, sizeof(float) * kTileRows);
                } else {
                    for (int64_t r = 0; r < m - i; r++) to[r] = column[i + r];
                }
            }
        }
}

// As finish_row for a tile. Most are whole and float32: the compiler unrolls those.
static void finish_tile(const Product& p, const float* sums, const RowScale* scales, int64_t m, int64_t rows, int64_t n,
                        int64_t cols, bool first_part, bool last_part, float* partial, int64_t partial_row) {
    if (!all_float32(p))
        finish_rows_as<false>(p, sums, kPanel, scales, m, rows, n, cols, first_part, last_part, partial, partial_row);
    else if (rows == kTileRows && cols == kPanel)
        finish_rows_as<true>(p, sums, kPanel, nullptr, m, kTileRows, n, kPanel, first_part, last_part, partial,
                             partial_row);
    else
        finish_rows_as<true>(p, sums, kPanel, nullptr, m, rows, n, cols, first_part, last_part, partial, partial_row);
}

// What follows a tile's sums reads and writes them there: on its way while they are made.
FASTGPT_INLINE void fetch_results(const Product& p, int64_t m, int64_t rows, int64_t n) {
    for (int64_t i = m; i < m + rows; i++) {
        FASTGPT_PREFETCH_TO_WRITE(static_cast<float*>(p.y) + i * p.y_row + n);
        if (p.residual) FASTGPT_PREFETCH(p.residual + i * p.residual_row + n);
        if (p.pre) FASTGPT_PREFETCH(p.pre + i * p.y_row + n);
    }
}

// How a tile finds its rows of x.
enum class Rows { kInPlace, kTurned, kPrepared };

// Any m, any layout.
template <class A, class T, Rows R>
static void tiles(const Product& p, const ProductScratch& scratch) {
    constexpr bool turned = R == Rows::kTurned, prepared = R == Rows::kPrepared;
    const bool column_major = p.w.row == 1, dynamic = p.w.format == kInt8Dynamic;
    const int64_t units = units_of<A>(p.k);
    // A weight's gradient sums over rows, in parts of about one depth; a forward product's parts are as they always
    // were.
    const int64_t depth = turned ? up(units, up(units, kBlockK)) : min(kBlockK, units);
    const int64_t width = kBlockFloats / (depth * kPanel) * kPanel;
    const int64_t blocks_m = up(p.m, R == Rows::kInPlace && p.y_format == kFloat32 ? kBlockM : kPreparedM);
    const int64_t tiles_m = up(p.m, kTileRows);
    for (int64_t b = 0; b < blocks_m; b++) {
        // On whole tiles: packed groups of rows start anew with each block.
        const int64_t m0 = tiles_m * b / blocks_m * kTileRows, m1 = min(tiles_m * (b + 1) / blocks_m * kTileRows, p.m);
        const auto row_of_x = [&](int64_t m) { return p.x.at + m * p.x.row; };
        for (int64_t m = m0; dynamic && m < m1; m++) scratch.scales[m - m0].scale = row_scale(row_of_x(m), p.k);

        // The part of K from unit u0 on.
        const auto prepare = [&](int64_t u0) {
            const int64_t u = min(depth, units - u0), k0 = u0 * A::in_unit, k = min(u * A::in_unit, p.k - k0);
            if constexpr (turned) pack_transposed<A>(p.x.at + m0 + k0 * p.x.col, p.x.col, m1 - m0, k, scratch.x);
            for (int64_t m = m0; prepared && m < m1; m++) {
                RowScale& scale = scratch.scales[m - m0];
                const float offset = prepare_row<A>(row_of_x(m) + k0, k, dynamic ? scale.scale : 1.0f,
                                                    scratch.x + (m - m0) * unit_row(depth));
                scale.offset = offset;
            }
        };
        const auto multiply = [&](int64_t u0, int64_t n0) {
            const int64_t u = min(depth, units - u0), k0 = u0 * A::in_unit, k = min(u * A::in_unit, p.k - k0);
            const int64_t n1 = min(n0 + width, p.n), next = min(width, p.n + p.following - n1);
            for (int64_t n = n0; n < n1; n += kPanel) pack_panel<A, T>(p, n, k0, k, scratch.packed + (n - n0) * u);
            // The next block's part of W is fetched meanwhile: `runs` pieces of `run` lines, ahead_row apart.
            const int64_t format = p.w.format;
            const char* ahead = static_cast<const char*>(moved(p.w.at, bytes(format, n1 * p.w.row + k0 * p.w.col)));
            const int64_t ahead_row = bytes(format, column_major ? p.w.col : p.w.row);
            const int64_t run = up(bytes(format, column_major ? next : k), 64);
            int64_t runs = next <= 0 ? 0 : column_major ? k : next;
            const int64_t runs_a_tile = runs > 0 ? u / run : 0;
            // Of the next rows of x some come with each panel, so many lines of each.
            const int64_t share = up(kTileRows, up(n1 - n0, kPanel)), steps = up(k, share);
            for (int64_t m = m0; m < m1; m += kTileRows)
                for (int64_t n = n0; n < n1; n += kPanel) {
                    const int64_t rows = min(kTileRows, m1 - m), cols = min(kPanel, n1 - n);
                    const float* panel = scratch.packed + (n - n0) * u;
                    const float* x = turned     ? scratch.x + (m - m0) * u
                                     : prepared ? scratch.x + (m - m0) * unit_row(depth)
                                                : row_of_x(m) + k0;
                    const int64_t x_row = prepared ? unit_row(depth) : p.x.row;
                    Ahead meanwhile{reinterpret_cast<const char*>(panel), u, 0, 64};
                    if (runs > 0) {
                        meanwhile = {ahead, run, ahead_row - run * 64, 64};
                        ahead += runs_a_tile * ahead_row, runs -= runs_a_tile;
                    } else if (kFetchAll && R == Rows::kInPlace) {
                        const int64_t first = m + kTileRows + (n - n0) / kPanel * share;
                        if (first + share <= m1)
                            meanwhile = {reinterpret_cast<const char*>(row_of_x(first) + k0), steps,
                                         4 * (p.x.row - steps * share), 4 * share};
                    }
                    if (kFetchAll && p.y_format == kFloat32) fetch_results(p, m, rows, n);
                    const TileKernel kernel = tile_for<A, turned>(rows, cols);
                    if (nothing_follows(p) && u == units && cols == kPanel) {
                        kernel(u, x, x_row, panel, meanwhile, static_cast<float*>(p.y) + m * p.y_row + n, p.y_row);
                        continue;
                    }
                    kernel(u, x, x_row, panel, meanwhile, scratch.sums, kPanel);
                    const bool wide = p.y_format == kFloat32;
                    float* partial = wide ? static_cast<float*>(p.y) + m * p.y_row + n
                                          : scratch.partial + (m - m0) * kBlockCols + n - n0;
                    finish_tile(p, scratch.sums, dynamic ? scratch.scales + (m - m0) : nullptr, m, rows, n, cols,
                                u0 == 0, u0 + u == units, partial, wide ? p.y_row : kBlockCols);
                }
        };
        if (p.y_format == kFloat32 || depth == units) {
            for (int64_t u0 = 0; u0 < units; u0 += depth) {
                prepare(u0);
                for (int64_t n0 = 0; n0 < p.n; n0 += width) multiply(u0, n0);
            }
        } else {  // sums that y cannot hold wait in the scratch, a panel of them
            for (int64_t n0 = 0; n0 < p.n; n0 += width)
                for (int64_t u0 = 0; u0 < units; u0 += depth) {
                    prepare(u0);
                    multiply(u0, n0);
                }
        }
    }
}

static_assert(kBlockK % kChain == 0 && kBlockCols % kPanel == 0, "the parts fit each other");

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
