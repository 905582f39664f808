// The vector type that every kernel is written in.
//
// kernels.cpp is compiled once per instruction set; FASTGPT_ISA names the namespace and the compiler's flags
// choose the type below. Nothing here may come from std:: as a template: an inline function compiled with
// AVX-512 flags could be the copy that the linker keeps for the baseline build.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// For GCC, clang and clang-cl. A loop over registers that is not unrolled leaves them in memory.
#ifdef __clang__
#define FASTGPT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FASTGPT_UNROLL _Pragma("GCC unroll 16")
#endif
#define FASTGPT_ALWAYS_INLINE inline __attribute__((always_inline))
#define FASTGPT_PREFETCH(address) __builtin_prefetch(address)
#define FASTGPT_PREFETCH_FAR(address) __builtin_prefetch(address, 0, 1)  // into the second cache
#define FASTGPT_KEEP(variable) asm("" : "+r"(variable))                  // the compiler may not recompute it
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

namespace fastgpt {
namespace FASTGPT_ISA {

#if defined(__AVX512F__)

struct Vec {
    static constexpr int width = 16, registers = 32;
    __m512 v;
};
// Loads and stores with a count touch the first n lanes only; lanes not loaded are 0.
FASTGPT_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
FASTGPT_INLINE Vec broadcast(float s) { return {_mm512_set1_ps(s)}; }
FASTGPT_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FASTGPT_INLINE Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
FASTGPT_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
FASTGPT_INLINE void store(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
FASTGPT_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTGPT_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTGPT_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTGPT_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTGPT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Where a lane of b is not a number, so is the result's: both instructions return their second operand then.
FASTGPT_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
FASTGPT_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
FASTGPT_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FASTGPT_INLINE Vec scale_by_power_of_2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
FASTGPT_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
FASTGPT_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

// The sums of four registers' lanes, into out[0..3].
FASTGPT_INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}
// dst[i * dst_stride + j] = src[j][i]: a block of width x width.
FASTGPT_INLINE void transpose(const Vec (&src)[16], float* dst, int64_t dst_stride) {
    __m512 t[16], u[16];
    FASTGPT_UNROLL
    for (int i = 0; i < 16; i += 4) {
        __m512 a = _mm512_unpacklo_ps(src[i].v, src[i + 1].v), b = _mm512_unpackhi_ps(src[i].v, src[i + 1].v);
        __m512 c = _mm512_unpacklo_ps(src[i + 2].v, src[i + 3].v), d = _mm512_unpackhi_ps(src[i + 2].v, src[i + 3].v);
        t[i] = _mm512_shuffle_ps(a, c, 0x44), t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm512_shuffle_ps(b, d, 0x44), t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    FASTGPT_UNROLL
    for (int i = 0; i < 4; i++) {  // t[4 * q + i] holds rows 4q..4q+3 of columns i, i + 4, i + 8, i + 12
        u[i] = _mm512_shuffle_f32x4(t[i], t[4 + i], 0x88), u[4 + i] = _mm512_shuffle_f32x4(t[i], t[4 + i], 0xdd);
        u[8 + i] = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0x88);
        u[12 + i] = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0xdd);
    }
    FASTGPT_UNROLL
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_ps(dst + i * dst_stride, _mm512_shuffle_f32x4(u[i], u[8 + i], 0x88));
        _mm512_storeu_ps(dst + (i + 8) * dst_stride, _mm512_shuffle_f32x4(u[i], u[8 + i], 0xdd));
        _mm512_storeu_ps(dst + (i + 4) * dst_stride, _mm512_shuffle_f32x4(u[4 + i], u[12 + i], 0x88));
        _mm512_storeu_ps(dst + (i + 12) * dst_stride, _mm512_shuffle_f32x4(u[4 + i], u[12 + i], 0xdd));
    }
}

#elif defined(__AVX2__)

struct Vec {
    static constexpr int width = 8, registers = 16;
    __m256 v;
};
FASTGPT_INLINE __m256i first(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}
FASTGPT_INLINE Vec broadcast(float s) { return {_mm256_set1_ps(s)}; }
FASTGPT_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
FASTGPT_INLINE Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
FASTGPT_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
FASTGPT_INLINE void store(float* p, Vec a, int64_t n) { _mm256_maskstore_ps(p, first(n), a.v); }
FASTGPT_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTGPT_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTGPT_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTGPT_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
FASTGPT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTGPT_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
FASTGPT_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
FASTGPT_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FASTGPT_INLINE __m256 power_of_2(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// In two factors: 2^n alone would leave the range of float32 where the product still lies in it.
FASTGPT_INLINE Vec scale_by_power_of_2(Vec a, Vec n) {
    const __m256i i = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(i, 1);
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, power_of_2(half)), power_of_2(_mm256_sub_epi32(i, half)))};
}
FASTGPT_INLINE __m128 fold(__m256 a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
FASTGPT_INLINE float sum(Vec a) {
    __m128 s = fold(a.v);
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FASTGPT_INLINE float largest(Vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

FASTGPT_INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
FASTGPT_INLINE void transpose(const Vec (&src)[8], float* dst, int64_t dst_stride) {
    __m256 t[8];
    FASTGPT_UNROLL
    for (int i = 0; i < 8; i += 4) {
        __m256 a = _mm256_unpacklo_ps(src[i].v, src[i + 1].v), b = _mm256_unpackhi_ps(src[i].v, src[i + 1].v);
        __m256 c = _mm256_unpacklo_ps(src[i + 2].v, src[i + 3].v), d = _mm256_unpackhi_ps(src[i + 2].v, src[i + 3].v);
        t[i] = _mm256_shuffle_ps(a, c, 0x44), t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44), t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    FASTGPT_UNROLL
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(dst + i * dst_stride, _mm256_permute2f128_ps(t[i], t[4 + i], 0x20));
        _mm256_storeu_ps(dst + (i + 4) * dst_stride, _mm256_permute2f128_ps(t[i], t[4 + i], 0x31));
    }
}

#else  // baseline: four lanes in plain C++, which compilers turn into SSE2 or NEON

struct Vec {
    static constexpr int width = 4, registers = 16;
    float v[width];
};
FASTGPT_INLINE Vec broadcast(float s) { return {{s, s, s, s}}; }
FASTGPT_INLINE Vec load(const float* p) {
    Vec r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
FASTGPT_INLINE Vec load(const float* p, int64_t n) {
    Vec r = broadcast(0.0f);
    for (int64_t i = 0; i < n; ++i) r.v[i] = p[i];
    return r;
}
FASTGPT_INLINE void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof a.v); }
FASTGPT_INLINE void store(float* p, Vec a, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = a.v[i];
}
template <class F>
FASTGPT_INLINE Vec lanes(F f) {
    Vec r;
    for (int i = 0; i < Vec::width; ++i) r.v[i] = f(i);
    return r;
}
FASTGPT_INLINE Vec operator+(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] + b.v[i]; });
}
FASTGPT_INLINE Vec operator-(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] - b.v[i]; });
}
FASTGPT_INLINE Vec operator*(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] * b.v[i]; });
}
FASTGPT_INLINE Vec operator/(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] / b.v[i]; });
}
FASTGPT_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
FASTGPT_INLINE Vec max(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
FASTGPT_INLINE Vec min(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// Adding 1.5 * 2^23 leaves no bit for a fraction; right for |a| < 2^22, and the callers clamp first.
FASTGPT_INLINE Vec round(Vec a) {
    const float shift = 12582912.0f;
    return lanes([&](int i) { return (a.v[i] + shift) - shift; });
}
FASTGPT_INLINE float power_of_2(int32_t n) {
    const int32_t bits = (n + 127) * (1 << 23);
    float r;
    std::memcpy(&r, &bits, sizeof r);
    return r;
}
FASTGPT_INLINE Vec scale_by_power_of_2(Vec a, Vec n) {
    return lanes([&](int i) {
        const int32_t whole = n.v[i] == n.v[i] ? static_cast<int32_t>(n.v[i]) : 0, half = whole >> 1;
        return a.v[i] * power_of_2(half) * power_of_2(whole - half);
    });
}
FASTGPT_INLINE float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
FASTGPT_INLINE float largest(Vec a) {
    float m = a.v[0];
    for (int i = 1; i < Vec::width; ++i) m = a.v[i] > m ? a.v[i] : m;
    return m;
}

FASTGPT_INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}
FASTGPT_INLINE void transpose(const Vec (&src)[4], float* dst, int64_t dst_stride) {
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) dst[i * dst_stride + j] = src[j].v[i];
}

#endif

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
