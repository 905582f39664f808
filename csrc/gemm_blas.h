// Products of many rows by a BLAS, where the build has one: on a Mac Accelerate, which alone reaches Apple's matrix
// unit. What follows the sums is done by us while they are in the cache.
//
// They come in blocks of one size, whatever the threads and the other rows; the last rows are filled up to a whole
// block of kBlasRows. So a row's bits do not depend on how many others there are, as far as the BLAS sums up each row
// of a product in one way.
#pragma once

#include "product.h"

#ifdef FASTGPT_SGEMM  // the name of its cblas_sgemm, whose header is another one with each BLAS
extern "C" void FASTGPT_SGEMM(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float* a,
                              int lda, const float* b, int ldb, float beta, float* c, int ldc);
#endif

namespace fastgpt {
namespace FASTGPT_ISA {

#ifdef FASTGPT_SGEMM
constexpr int64_t kBlasM = 256, kBlasN = 384;  // rows and columns of a block
constexpr int64_t kBlasRows = 32;
constexpr int64_t kBlasDepth = (kPreparedX - kBlasM * kBlasN) / kBlasRows;  // of rows that are copied to fill them up
constexpr int64_t kLeastN = 192, kLeastK = 256;                             // a BLAS has other ways for small products
constexpr int64_t kMostInt = 0x7fffffff;

enum Cblas { kRowMajor = 101, kNoTrans = 111, kTrans = 112 };

inline bool by_blas(const Product& p) {
#ifdef FASTGPT_NARROW_DOTS
    if (p.narrow_sums) return false;
#endif
    if (p.w.format != kFloat32 || p.w.alike || p.n < kLeastN || p.k < kLeastK) return false;
    const int64_t strides = max(max(p.x.row, p.x.col), max(p.w.row, p.w.col));
    return strides <= kMostInt && (p.x.col != 1 || p.k <= kBlasDepth);
}

inline void blas_block(const Product& p, const float* x, int64_t x_row, int64_t n0, int64_t m, int64_t n, float* y) {
    const bool turned = p.x.col != 1, column_major = p.w.col != 1;
    // A single row's stride may be anything; a BLAS asks for one that spans it.
    const int64_t of_x = turned ? max(p.x.col, m) : max(x_row, p.k),
                  of_w = column_major ? max(p.w.col, n) : max(p.w.row, p.k);
    const auto i = [](int64_t size) { return static_cast<int>(size); };
    FASTGPT_SGEMM(kRowMajor, turned ? kTrans : kNoTrans, column_major ? kNoTrans : kTrans, i(m), i(n), i(p.k), 1.0f, x,
                  i(of_x), static_cast<const float*>(p.w.at) + n0 * p.w.row, i(of_w), 0.0f, y, i(kBlasN));
}

// One of the blocks that up(p.m, kBlasM) x up(p.n, kBlasN) are.
inline void run_blas_block(const Product& p, int64_t block_m, int64_t block_n, const ProductScratch& scratch) {
    const int64_t m0 = block_m * kBlasM, m = min(kBlasM, p.m - m0), blocks_n = up(p.n, kBlasN);
    const int64_t n0 = p.n * block_n / blocks_n, n = p.n * (block_n + 1) / blocks_n - n0;  // none much narrower
    const int64_t whole = p.x.col == 1 ? m / kBlasRows * kBlasRows : m;
    float *sums = scratch.x, *copied = sums + kBlasM * kBlasN;
    const float* x = p.x.at + m0 * p.x.row;
    if (whole) blas_block(p, x, p.x.row, n0, whole, n, sums);
    if (whole < m) {
        for (int64_t r = 0; r < kBlasRows; ++r) {
            const int64_t from = min(whole + r, m - 1);
            std::memcpy(copied + r * p.k, x + from * p.x.row, static_cast<size_t>(p.k) * sizeof(float));
        }
        blas_block(p, copied, p.k, n0, kBlasRows, n, sums + whole * kBlasN);
    }
    for (int64_t r = 0; r < m; ++r)
        finish_row(p, sums + r * kBlasN, nullptr, m0 + r, n0, n, true, true,
                   static_cast<float*>(p.y) + (m0 + r) * p.y_row + n0);
}
#else
constexpr int64_t kBlasM = 1, kBlasN = 1;
inline bool by_blas(const Product&) { return false; }
inline void run_blas_block(const Product&, int64_t, int64_t, const ProductScratch&) {}
#endif

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
