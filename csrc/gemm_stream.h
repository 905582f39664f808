// Products of few rows with a column-major weight (the book's weight loader leaves such parameters). Eight rows of W^T
// at a time are read along and added into y, which stays in the cache.
#pragma once

#include "product.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int kStreamRows = 8;                    // rows of a column-major W taken together ..
constexpr int kStreamVecs = kWide ? 2 : 1;        // .. and registers of each
constexpr int64_t kStreamCols = 1024;             // columns of y summed up side by side ..
constexpr int64_t kStreamRow = kStreamCols + 16;  // .. in rows that do not fall on each other in the cache
constexpr int64_t kStreamDepth = 128;             // .. and products in one sum before it joins y
constexpr int64_t kStreamAhead = 256;             // numbers between what is used and what is fetched
constexpr int64_t kMaxStreamM = 32;               // rows of x up to which a column-major W is streamed

// G rows of W from k0 on by a few registers from column n on, times every row of x, into sums[i * kStreamRow + n - n0]:
// stored where `fresh`, else added.
template <class T, int G, bool Full>
FASTGPT_INLINE void stream_block(const Product& p, int64_t k0, int64_t n, const T* ahead, float* sums, bool fresh) {
    Vec w[G][kStreamVecs];
    FASTGPT_UNROLL
    for (int g = 0; g < G; g++) FASTGPT_UNROLL
    for (int v = 0; v < kStreamVecs; v++) {
        const T* from = static_cast<const T*>(p.w.at) + (k0 + g) * p.w.col + n + v * Vec::width;
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

template <class T, int G>
static void stream_rows(const Product& p, int64_t k0, int64_t n0, int64_t n1, float* sums, bool fresh) {
    constexpr int64_t step = kStreamVecs * Vec::width;
    int64_t n = n0;
    for (; n + step <= n1; n += step) {
        const T* ahead = static_cast<const T*>(p.w.at) + k0 * p.w.col + n + kStreamAhead;
        if (n + kStreamAhead >= n1) ahead += G * p.w.col - (n1 - n0);  // the start of the next rows
        stream_block<T, G, true>(p, k0, n, ahead, sums + n - n0, fresh);
    }
    if (n < n1) stream_block<T, G, false>(p, k0, n, nullptr, sums + n - n0, fresh);
}

// W column-major, m <= kMaxStreamM. A y that cannot hold sums gets them once they are whole.
template <class T>
static void stream(const Product& p, float* workspace) {
    float* sums = workspace;  // [m, kStreamRow]
    for (int64_t n0 = 0; n0 < p.n; n0 += kStreamCols) {
        const int64_t n1 = min(n0 + kStreamCols, p.n), depth = p.y_format == kFloat32 ? kStreamDepth : p.k;
        for (int64_t k0 = 0; k0 < p.k; k0 += depth) {
            int64_t k1 = min(k0 + depth, p.k), k = k0;
            for (; k + kStreamRows <= k1; k += kStreamRows) stream_rows<T, kStreamRows>(p, k, n0, n1, sums, k == k0);
            for (; k < k1; k++) stream_rows<T, 1>(p, k, n0, n1, sums, k == k0);
            for (int64_t i = 0; i < p.m; i++)
                finish_row(p, sums + i * kStreamRow, nullptr, i, n0, n1 - n0, k0 == 0, k1 == p.k,
                           static_cast<float*>(p.y) + i * p.y_row + n0);
        }
    }
}

static_assert(kStreamDepth % kStreamRows == 0, "the parts of K fit each other");
static_assert(kProductScratch >= kStreamRow * kMaxStreamM && kStreamCols % (kStreamVecs * Vec::width) == 0, "sums fit");

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
