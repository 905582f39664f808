// Products of many rows by a BLAS, where the build has one: on a Mac Accelerate, which alone reaches Apple's matrix
// unit. What follows the sums is done by us while they are in the cache.
//
// They come in blocks of up to kBlasM rows and kBlasN columns, whatever the threads; the last rows are filled up to a
// multiple of kBlasRows. A row's bits must not depend on how many others there are, or where among them it stands. That
// holds if the BLAS sums up each row of such a block in one way, which is tried once; if it does not, as OpenBLAS's
// kernels for AVX2, products stay ours.
#pragma once

#include <cstdlib>

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

inline void sgemm(bool turned, bool column_major, int64_t m, int64_t n, int64_t k, const float* x, int64_t x_row,
                  const float* w, int64_t w_row, float* y) {
    const auto i = [](int64_t size) { return static_cast<int>(size); };
    FASTGPT_SGEMM(kRowMajor, turned ? kTrans : kNoTrans, column_major ? kNoTrans : kTrans, i(m), i(n), i(k), 1.0f, x,
                  i(x_row), w, i(w_row), 0.0f, y, i(kBlasN));
}

// Whether rows have the same bits in blocks of other heights and at other places.
inline bool sums_rows_alike() {
    constexpr int64_t k = kLeastK + 7, n = kLeastN + 1, rows = 2 * kBlasM;
    float* const x = static_cast<float*>(std::malloc(sizeof(float) * ((rows + n) * k + 2 * kBlasM * kBlasN)));
    if (!x) return false;
    float *const w = x + rows * k, *const whole = w + n * k, *const part = whole + kBlasM * kBlasN;
    uint32_t bits = 1;
    for (int64_t i = 0; i < (rows + n) * k; ++i) {
        bits = bits * 1664525u + 1013904223u;
        x[i] = static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-31f;
    }
    bool alike = true;
    for (int column_major = 0; column_major < 2; ++column_major) {
        const int64_t w_row = column_major ? n : k;
        sgemm(false, column_major, kBlasM, n, k, x, k, w, w_row, whole);
        for (int64_t m = kBlasRows; m <= kBlasM; m += kBlasRows) {
            const int64_t places[] = {0, 5, kBlasM - m};
            for (int64_t first : places) {
                sgemm(false, column_major, m, n, k, x + first * k, k, w, w_row, part);
                for (int64_t r = 0; r < m && first + r < kBlasM; ++r)
                    for (int64_t c = 0; c < n; ++c)
                        alike = alike && part[r * kBlasN + c] == whole[(first + r) * kBlasN + c];
            }
        }
    }
    std::free(x);
    return alike;
}

inline bool takes_blas() {
    static const bool alike = sums_rows_alike();
    return alike;
}

inline bool by_blas(const Product& p) {
#ifdef FASTGPT_NARROW_DOTS
    if (p.narrow_sums) return false;
#endif
    if (p.w.format != kFloat32 || p.w.alike || p.n < kLeastN || p.k < kLeastK) return false;
    const int64_t strides = max(max(p.x.row, p.x.col), max(p.w.row, p.w.col));
    return strides <= kMostInt && (p.x.col != 1 || p.k <= kBlasDepth) && takes_blas();
}

inline void blas_block(const Product& p, const float* x, int64_t x_row, int64_t n0, int64_t m, int64_t n, float* y) {
    const bool turned = p.x.col != 1, column_major = p.w.col != 1;
    // A single row's stride may be anything; a BLAS asks for one that spans it.
    const int64_t of_x = turned ? max(p.x.col, m) : max(x_row, p.k),
                  of_w = column_major ? max(p.w.col, n) : max(p.w.row, p.k);
    sgemm(turned, column_major, m, n, p.k, x, of_x, static_cast<const float*>(p.w.at) + n0 * p.w.row, of_w, y);
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
inline bool takes_blas() { return false; }
inline bool by_blas(const Product&) { return false; }
inline void run_blas_block(const Product&, int64_t, int64_t, const ProductScratch&) {}
#endif

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
