// A product y = epilogue(x W^T + bias + residual), and what follows its sums.
#pragma once

#include "arithmetic.h"
#include "gelu.h"

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
    Matrix x;
    Weight w;
    void* y;  // rows y_row apart, in y_format
    int64_t y_row, m, n, k;
    Numbers bias{};                   // [n]
    const float* residual = nullptr;  // [m, n], rows residual_row apart; may be y itself
    int64_t residual_row = 0;
    Epilogue epilogue = kPlain;  // another one not together with residual
    float* pre = nullptr;        // [m, n], rows y_row apart, like act
    float* act = nullptr;
    int64_t y_format = kFloat32;
    int64_t following = 0;     // rows of w behind these, which are likely to be read next
    bool narrow_sums = false;  // whether many rows may take factors in bfloat16 though the weight is wider
};

constexpr bool kWide = Vec::registers == 32;
constexpr int kVecs = kWide ? 3 : 2;  // a tile is kTileRows x kVecs registers of sums
constexpr int kTileRows = kWide ? 8 : 6;
constexpr int kPanel = kVecs * Vec::width;              // columns of y a tile covers
constexpr bool kFetchAll = !kWide;                      // x and y ahead of their use too; with AVX-512 not tried
constexpr int64_t kBlockK = 768;                        // depth of a packed block, in units
constexpr int64_t kBlockCols = 48;                      // .. and its width where it is as deep as that, a few panels:
constexpr int64_t kBlockFloats = kBlockCols * kBlockK;  // 144 KB, so that the next one fits beside it in L2
constexpr int64_t kBlockM = 1024;                       // rows of x swept per packed block
constexpr int64_t kPreparedM = 512;                     // .. where x is rearranged too
constexpr int64_t kChain = 128;                // products added up in one register before they join the sum so far
constexpr int64_t kDotChunk = 64;              // columns between two epilogues of the dots
constexpr int64_t kMaxDotM = kWide ? 32 : 64;  // rows of x up to which dots are used ..
constexpr int64_t kMaxInt4DotM = 16;           // .. with a weight of four bits
constexpr int64_t kAlikeCols = 192;            // columns that many rows pass by a few at a time
// Floats of scratch a thread, and what a product that rearranges x or writes narrow numbers needs on top.
constexpr int64_t kProductScratch = kBlockFloats + kTileRows * kPanel + kDotChunk * kMaxDotM;
constexpr int64_t kPreparedRows = kPreparedM + 2 * kTileRows;  // whole tiles may take a few more
constexpr int64_t kPreparedX = kPreparedRows * kBlockK;
constexpr int64_t kRearrangedScratch = kPreparedX + kPreparedRows * (kBlockCols + 2);
#ifdef FASTGPT_SGEMM  // a BLAS's sums lie there too
constexpr bool kBlas = true;
#else
constexpr bool kBlas = false;
#endif
constexpr int64_t product_scratch(bool rearranges) {
    return kProductScratch + (rearranges || kBlas ? kRearrangedScratch : 0);
}

// A thread's scratch, parted.
struct ProductScratch {
    float *packed, *sums;  // kBlockFloats, and a tile's or the dots'
    // Of kRearrangedScratch, where the product may need it:
    float *x, *partial;  // the rows of x as a kernel reads them; sums over a part of K
    RowScale* scales;    // of kPreparedRows rows

    explicit ProductScratch(float* memory)
        : packed(memory),
          sums(packed + kBlockFloats),
          x(memory + kProductScratch),
          partial(x + kPreparedX),
          scales(reinterpret_cast<RowScale*>(partial + kPreparedRows * kBlockCols)) {}
};

// Whether what follows the sums is in float32.
FASTGPT_INLINE bool all_float32(const Product& p) {
    return p.y_format == kFloat32 && p.bias.format == kFloat32 && !has_row_scale(p.w);
}

// Whether y is the sums themselves.
FASTGPT_INLINE bool nothing_follows(const Product& p) {
    return all_float32(p) && p.epilogue == kPlain && !p.bias.at && !p.residual;
}

// Rows of sums over a part of K, n in each, sums_row apart, into y from that row and column on: bias and residual join
// with the first part, the epilogue with the last. Until then they wait in `partial`, rows partial_row apart, which is
// y where that is float32. FLOAT32: that all of it is.
template <bool FLOAT32>
FASTGPT_INLINE void finish_rows_as(const Product& p, const float* sums, int64_t sums_row, const RowScale* scales,
                                   int64_t row, int64_t rows, int64_t col, int64_t n, bool first_part, bool last_part,
                                   float* partial, int64_t partial_row) {
    const int64_t at = row * p.y_row + col;
    const Numbers bias = first_part ? from(p.bias, col) : Numbers{};
    const float* more = !first_part ? partial : p.residual ? p.residual + row * p.residual_row + col : nullptr;
    const int64_t more_row = first_part ? p.residual_row : partial_row;
    const float* of_column = has_row_scale(p.w) ? static_cast<const float*>(p.w.scale) + col : nullptr;
    const Epilogue epilogue = last_part ? p.epilogue : kPlain;
    for_each_vec(n, [&](int64_t j, int64_t c) {
        for (int64_t i = 0; i < rows; i++) {
            const int64_t to = at + i * p.y_row + j;
            Vec v = load_part(sums + i * sums_row + j, c);
            if (!FLOAT32 && scales) v = (v - broadcast(scales[i].offset)) * broadcast(scales[i].scale);
            if (!FLOAT32 && of_column) v = v * load_part(of_column + j, c);
            if (bias.at) v = v + (FLOAT32 ? load_part(static_cast<const float*>(bias.at) + j, c) : load(bias, j, c));
            if (more) v = v + load_part(more + i * more_row + j, c);
            if (epilogue == kGelu) {
                if (p.pre) store_part(p.pre + to, v, c);
                v = gelu(v);
            } else if (epilogue == kGeluBackward) {
                const Gelu g = gelu_and_slope(load_part(p.pre + to, c));
                if (p.act) store_part(p.act + to, g.value, c);
                v = v * g.slope;
            }
            if (FLOAT32 || !last_part)
                store_part(partial + i * partial_row + j, v, c);
            else
                store(p.y_format, p.y, to, v, c);
        }
    });
}

FASTGPT_INLINE void finish_row(const Product& p, const float* sums, const RowScale* scale, int64_t row, int64_t col,
                               int64_t n, bool first_part, bool last_part, float* partial) {
    if (all_float32(p))
        finish_rows_as<true>(p, sums, 0, nullptr, row, 1, col, n, first_part, last_part, partial, 0);
    else
        finish_rows_as<false>(p, sums, 0, scale, row, 1, col, n, first_part, last_part, partial, 0);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
