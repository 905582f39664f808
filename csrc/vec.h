// The vector type that every kernel is written in.
//
// kernels.cpp is compiled once per instruction set; FASTGPT_ISA names the namespace and the compiler's flags
// choose the type below. Nothing here may come from std:: as a template: an inline function compiled with
// AVX-512 flags could be the copy that the linker keeps for the baseline build.
#pragma once

#include <cstdint>
#include <cstring>

// For GCC, clang and clang-cl. A loop over registers that is not unrolled leaves them in memory.
#ifdef __clang__
#define FASTGPT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FASTGPT_UNROLL _Pragma("GCC unroll 16")
#endif
#define FASTGPT_ALWAYS_INLINE inline __attribute__((always_inline))
#define FASTGPT_PREFETCH(address) __builtin_prefetch(address)
#define FASTGPT_PREFETCH_FAR(address) __builtin_prefetch(address, 0, 1)  // into the second cache
#define FASTGPT_PREFETCH_TO_WRITE(address) __builtin_prefetch(address, 1)
#define FASTGPT_KEEP(variable) asm("" : "+r"(variable))  // the compiler may not recompute it
#ifdef __AVX512F__
#define FASTGPT_KEEP_VEC(vec) asm("" : "+v"(vec.v))
#else
#define FASTGPT_KEEP_VEC(vec)
#endif
#define FASTGPT_INLINE static FASTGPT_ALWAYS_INLINE
// The build for processors with dot products of bfloat16 pairs and of int8.
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define FASTGPT_NARROW_DOTS
#endif

#if defined(__AVX2__) && (defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__))
#include "masked_lanes.h"
#endif
#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_four.h"
#endif

namespace fastgpt {
namespace FASTGPT_ISA {

FASTGPT_INLINE Vec zero() { return broadcast(0.0f); }

// e^x to about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial of degree 7 in r (Cephes expf), times 2^n.
// Overflows to infinity, underflows through the subnormals to 0, and a NaN goes through.
FASTGPT_INLINE Vec exp(Vec x) {
    x = min(broadcast(89.0f), max(broadcast(-104.5f), x));
    const Vec n = round(x * broadcast(1.44269504088896341f));
    const Vec r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
    Vec p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(p, r * r, r + broadcast(1.0f));
    return scale_by_power_of_2(p, n);
}

FASTGPT_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FASTGPT_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
FASTGPT_INLINE int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }  // a / b, rounded up

// Calls f(offset, vector length) for each vector of a row, the last one possibly short.
template <class F>
FASTGPT_INLINE void for_each_vec(int64_t cols, F f) {
    int64_t c = 0;
    for (; c + Vec::width <= cols; c += Vec::width) f(c, Vec::width);
    if (c < cols) f(c, cols - c);
}

FASTGPT_INLINE Vec load_part(const float* p, int64_t n) { return n == Vec::width ? load(p) : load(p, n); }
FASTGPT_INLINE void store_part(float* p, Vec v, int64_t n) { n == Vec::width ? store(p, v) : store(p, v, n); }

// dst[k * dst_row + j] = element k of row j for the first `cols` k and a register's worth of j; zero from j = rows on.
// whole(j, k) gives a register of a row's elements from k on, part(j, k, n) the first n of them.
template <class Whole, class Part>
FASTGPT_INLINE void transpose_rows(int64_t rows, int64_t cols, float* dst, int64_t dst_row, Whole whole, Part part) {
    constexpr int W = Vec::width;
    for (int64_t k = 0; k < cols; k += W) {
        Vec block[W];
        if (rows >= W && k + W <= cols) {
            FASTGPT_UNROLL
            for (int j = 0; j < W; j++) block[j] = whole(j, k);
            transpose(block, dst + k * dst_row, dst_row);
        } else {
            const int64_t c = min(W, cols - k);
            float scratch[W * W];
            for (int j = 0; j < W; j++) block[j] = j < rows ? part(j, k, c) : zero();
            transpose(block, scratch, W);
            for (int64_t i = 0; i < c; i++) store(dst + (k + i) * dst_row, load(scratch + i * W));
        }
    }
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
