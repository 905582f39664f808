// Products of few rows with a row-major weight: dot products along K. Every number of W is read once, in place, and
// widened in registers; the time is that of reading W. A few rows of W against up to eight of x stay in registers.
#pragma once

#include "product.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int kDotRows = kWide ? 8 : 3;                        // a dot tile: rows of x ..
constexpr int dot_cols(int rows) { return rows > 6 ? 3 : 4; }  // .. and rows of W
constexpr int64_t kDotDepth = 768;   // units over which a tile's rows of x stay in the L1 cache; any other for some
                                     // numbers of rows would give them other bits
constexpr int64_t kDotUnits = 6144;  // units of x that leave room beside them there
constexpr int64_t kDotAhead = 8192;  // bytes between what is used and what is fetched, at least

// Whether a group's scale is applied to a group's sum, and its minimum to the sum of x over the group: less work than
// to widen each weight where rows are this few.
template <class A, class T>
constexpr bool by_groups(int64_t rows) {
    return same<T, Int4> && A::in_unit == 2 && rows <= 2;
}

// The products over k columns from k0 on, 16 groups at a time.
template <class A, int MR, int COLS>
FASTGPT_INLINE void add_groups(int64_t k0, int64_t k, const float* x, const float* x_sums, int64_t x_row,
                               const WeightRow<Int4> (&w)[COLS], int64_t ahead, Vec (&sum)[MR][COLS]) {
    const int64_t first = k0 >> w[0].shift, groups = k >> w[0].shift, runs = w[0].shift == 5 ? 1 : 2;
    int64_t at = k0, u = 0;
    for_each_vec(groups, [&](int64_t g, int64_t n) {
        Vec scales[COLS];
        FASTGPT_UNROLL
        for (int j = 0; j < COLS; j++) {
            scales[j] = load(w[j].scale + first + g, n);
            const Vec minima = load(w[j].minimum + first + g, n);
            FASTGPT_UNROLL
            for (int i = 0; i < MR; i++) sum[i][j] = fma(minima, load(x_sums + i * x_row + first + g, n), sum[i][j]);
        }
        for (int64_t lane = 0; lane < n; lane++)
            for (int64_t r = 0; r < runs; r++, at += 32, u += Vec::width) {
                Vec steps[COLS], scale[COLS];
                FASTGPT_UNROLL
                for (int j = 0; j < COLS; j++) {
                    if (ahead) FASTGPT_PREFETCH_FAR(w[j].address(at + ahead));
                    steps[j] = A::steps(w[j], at);
                    scale[j] = A::lane_of(scales[j], lane);
                }
                FASTGPT_UNROLL
                for (int i = 0; i < MR; i++) {
                    const Vec xi = load(x + i * x_row + u);
                    FASTGPT_UNROLL
                    for (int j = 0; j < COLS; j++)
                        sum[i][j] = fma(A::add_product(A::nothing(), xi, steps[j]), scale[j], sum[i][j]);
                }
            }
    });
}

// sums[i * kDotChunk + j] (+)= x_i . w_j for MR rows of x, as units, and COLS rows of W from column k0 on, over k.
// Meanwhile what lies `ahead` numbers on is fetched into the cache.
template <class A, class T, int MR, int COLS>
static void dot_tile(int64_t k0, int64_t k, const float* x, const float* x_sums, int64_t x_row, const WeightRow<T>* w,
                     int64_t ahead, float* sums, bool add) {
    constexpr int64_t step = Vec::width * A::in_unit;
    typename A::Sum sum[MR][COLS];
    FASTGPT_UNROLL
    for (int i = 0; i < MR; i++) FASTGPT_UNROLL
    for (int j = 0; j < COLS; j++) sum[i][j] = A::nothing();
    WeightRow<T> rows[COLS];
    FASTGPT_UNROLL
    for (int j = 0; j < COLS; j++) rows[j] = w[j];
    // Every third row: the two between are reached by index. No array, or GCC keeps it in memory on Arm.
    const float *x0 = x, *x3 = x + 3 * x_row, *x6 = x + 6 * x_row;
    int64_t kk = 0;
    if constexpr (by_groups<A, T>(MR)) {
        add_groups<A>(k0, k, x, x_sums, x_row, rows, ahead, sum);
        kk = k;
    }
    for (; kk + step <= k; kk += step) {
        Vec wj[COLS];
        FASTGPT_UNROLL
        for (int j = 0; j < COLS; j++) {
            if (ahead) FASTGPT_PREFETCH_FAR(rows[j].address(k0 + kk + ahead));
            wj[j] = A::units(rows[j], k0 + kk);
        }
        FASTGPT_UNROLL
        for (int i = 0; i < MR; i++) {
            Vec xi = load((i < 3 ? x0 : i < 6 ? x3 : x6) + (i % 3) * x_row);
            FASTGPT_KEEP_VEC(xi);  // else the compiler loads it once for each row of W
            FASTGPT_UNROLL
            for (int j = 0; j < COLS; j++) sum[i][j] = A::add_product(sum[i][j], xi, wj[j]);
        }
        x0 += Vec::width, x3 += Vec::width, x6 += Vec::width;
        FASTGPT_KEEP(x0);  // else the compiler keeps one pointer a row and spills them
        if (MR > 3) FASTGPT_KEEP(x3);
        if (MR > 6) FASTGPT_KEEP(x6);
    }
    if (kk < k) {
        const float* rest = x + kk / A::in_unit;
        FASTGPT_UNROLL
        for (int j = 0; j < COLS; j++) {
            const Vec wj = A::units(rows[j], k0 + kk, k - kk);
            FASTGPT_UNROLL
            for (int i = 0; i < MR; i++)
                sum[i][j] = A::add_product(sum[i][j], load(rest + i * x_row, units_of<A>(k - kk)), wj);
        }
    }
    FASTGPT_UNROLL
    for (int i = 0; i < MR; i++) {
        float four[4];
        float* to = sums + i * kDotChunk;
        const Vec last = COLS > 3 ? A::value(sum[i][COLS - 1]) : zero();
        sum4(A::value(sum[i][0]), A::value(sum[i][1]), A::value(sum[i][2]), last, add ? four : to);
        if (add) FASTGPT_UNROLL
        for (int j = 0; j < COLS; j++) to[j] += four[j];
    }
}

template <class A, class T>
using DotKernel = void (*)(int64_t, int64_t, const float*, const float*, int64_t, const WeightRow<T>*, int64_t, float*,
                           bool);
template <class A, class T>
static const DotKernel<A, T> dots_by_rows[] = {dot_tile<A, T, 1, 4>,
                                               dot_tile<A, T, 2, 4>,
                                               dot_tile<A, T, 3, 4>,
                                               dot_tile<A, T, (kWide ? 4 : 1), 4>,
                                               dot_tile<A, T, (kWide ? 5 : 1), 4>,
                                               dot_tile<A, T, (kWide ? 6 : 1), 4>,
                                               dot_tile<A, T, (kWide ? 6 : 1), 3>,
                                               dot_tile<A, T, (kWide ? 7 : 1), 3>,
                                               dot_tile<A, T, (kWide ? 8 : 1), 3>};

// W row-major, m <= kMaxDotM; x as units, in rows x_row of them apart.
template <class A, class T>
static void dots(const Product& p, const float* x, int64_t x_row, const RowScale* scales, float* sums) {
    const bool repeated = p.w.alike && by_groups<A, T>(p.m);  // one row runs as three, none of them by groups
    if (repeated) x_row = 0;
    const int64_t groups = up(p.m, kDotRows), most = up(p.m, groups);
    const int64_t depth = kDotDepth * A::in_unit;
    const float* x_sums = x + unit_row(units_of<A>(p.k));  // of the groups of Int4, where they are used
    const int64_t cols = dot_cols(static_cast<int>(most)), chunk = kDotChunk / cols * cols;
    const int64_t soon = cols * p.w.row * up(kDotAhead, bytes(p.w.format, cols * p.w.row));
    for (int64_t n0 = 0; n0 < p.n; n0 += chunk) {
        const int64_t n = min(chunk, p.n - n0);
        for (int64_t k0 = 0; k0 < p.k; k0 += depth) {  // x over this depth stays in the L1 cache
            const int64_t k = min(depth, p.k - k0);
            const auto tile = [&](int64_t g, int64_t j, int64_t ahead) {
                const int64_t m0 = p.m * g / groups, m1 = p.m * (g + 1) / groups;
                const DotKernel<A, T> kernel = dots_by_rows<A, T>[repeated ? 2 : m1 - m0 - (cols == 4)];
                WeightRow<T> w[4];  // rows past the end repeat the last: computed, never stored
                for (int64_t i = 0; i < 4; i++) w[i] = WeightRow<T>(p.w, min(n0 + j + i, p.n - 1));
                kernel(k0, k, x + m0 * x_row + k0 / A::in_unit, x_sums + m0 * x_row, x_row, w, ahead,
                       sums + m0 * kDotChunk + j, k0 > 0);
            };
            // What stays in the L1 cache: a few rows of W, if all of x does beside them, else one group's rows of x.
            // Then each group fetches a part of what comes next, or the first would wait for memory alone.
            if (p.m * units_of<A>(k) <= kDotUnits) {
                for (int64_t j = 0; j < n; j += cols)
                    for (int64_t g = 0; g < groups; g++) tile(g, j, g ? 0 : soon);
            } else {
                const int64_t next = k0 + depth < p.k ? depth : chunk * p.w.row - k0;
                for (int64_t g = 0; g < groups; g++)
                    for (int64_t j = 0; j < n; j += cols)
                        tile(g, j, groups == 1 ? soon : j / cols % groups == g ? next : 0);
            }
        }
        for (int64_t i = 0; i < p.m; i++)
            finish_row(p, sums + i * kDotChunk, scales ? scales + i : nullptr, i, n0, n, true, true,
                       static_cast<float*>(p.y) + i * p.y_row + n0);
    }
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
