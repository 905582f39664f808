// The vector type of AVX-512: vec.h includes one of these.
#pragma once

#include <immintrin.h>

namespace fastgpt {
namespace FASTGPT_ISA {

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

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
