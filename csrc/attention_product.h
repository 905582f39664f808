// Attention's own small product: C (+)= A B for a tile of C that stays in registers.
#pragma once

#include "arithmetic.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// Registers: kGroupRows * kGroupVecs accumulators, kGroupVecs columns of B and one broadcast of A: 29 of 32, or 15
// of 16.
constexpr int kGroupRows = 6;
constexpr int kGroupVecs = Vec::registers == 32 ? 4 : 2;
constexpr int kGroupCols = kGroupVecs * Vec::width;

// C[ROWS, VECS * W] (+)= A[ROWS, k] B[k, VECS * W], over k units; the last vector holds `last` columns (W unless PART).
// TURNED: A lies as [k, ROWS], lda from one k to the next.
template <class Units, int ROWS, int VECS, bool ADD, bool TURNED, bool PART>
inline void attention_product_fixed(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                                    int64_t k, int64_t last) {
    const auto column = [last](const float* p, int j) {
        return PART && j == VECS - 1 ? load(p + j * Vec::width, last) : load(p + j * Vec::width);
    };
    Vec acc[ROWS][VECS];
    FASTGPT_UNROLL
    for (int i = 0; i < ROWS; ++i) FASTGPT_UNROLL
    for (int j = 0; j < VECS; ++j) acc[i][j] = zero();
    for (int64_t p = 0; p < k; ++p) {
        Vec row[VECS];
        FASTGPT_UNROLL
        for (int j = 0; j < VECS; ++j) row[j] = column(b + p * ldb, j);
        FASTGPT_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            const Vec s = broadcast(TURNED ? a[p * lda + i] : a[i * lda + p]);
            FASTGPT_UNROLL
            for (int j = 0; j < VECS; ++j) acc[i][j] = Units::add_product(acc[i][j], s, row[j]);
        }
    }
    FASTGPT_UNROLL
    for (int i = 0; i < ROWS; ++i) FASTGPT_UNROLL
    for (int j = 0; j < VECS; ++j) {
        float* p = c + i * ldc + j * Vec::width;
        if (ADD) acc[i][j] = acc[i][j] + column(p - j * Vec::width, j);  // last: shorter chains of sums are more exact
        PART&& j == VECS - 1 ? store(p, acc[i][j], last) : store(p, acc[i][j]);
    }
}

template <class Units, int ROWS, bool ADD, bool TURNED, int VECS = kGroupVecs>
inline void attention_product_cols(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                                   int64_t k, int64_t cols) {
    if (cols > (VECS - 1) * Vec::width) {
        const int64_t last = cols - (VECS - 1) * Vec::width;
        if (last == Vec::width)
            attention_product_fixed<Units, ROWS, VECS, ADD, TURNED, false>(a, lda, b, ldb, c, ldc, k, last);
        else
            attention_product_fixed<Units, ROWS, VECS, ADD, TURNED, true>(a, lda, b, ldb, c, ldc, k, last);
    } else if constexpr (VECS > 1) {
        attention_product_cols<Units, ROWS, ADD, TURNED, VECS - 1>(a, lda, b, ldb, c, ldc, k, cols);
    }
}

// C[rows, cols] (+)= A[rows, k] B[k, cols] for any number of rows and columns.
template <bool ADD, bool TURNED = false, class Units = Single>
inline void attention_product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                              int64_t rows, int64_t cols, int64_t k) {
    const int64_t step = TURNED ? 1 : lda;  // from one row of A to the next
    for (int64_t j = 0; j < cols; j += kGroupCols) {
        const int64_t n = min(kGroupCols, cols - j);
        int64_t i = 0;
        for (; i + kGroupRows <= rows; i += kGroupRows)
            attention_product_cols<Units, kGroupRows, ADD, TURNED>(a + i * step, lda, b + j, ldb, c + i * ldc + j, ldc,
                                                                   k, n);
        for (; i + 2 <= rows; i += 2)
            attention_product_cols<Units, 2, ADD, TURNED>(a + i * step, lda, b + j, ldb, c + i * ldc + j, ldc, k, n);
        for (; i < rows; ++i)
            attention_product_cols<Units, 1, ADD, TURNED>(a + i * step, lda, b + j, ldb, c + i * ldc + j, ldc, k, n);
    }
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
