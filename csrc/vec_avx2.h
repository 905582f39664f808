// The vector type of AVX2: vec.h includes one of these.
#pragma once

#include <immintrin.h>

namespace fastgpt {
namespace FASTGPT_ISA {

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

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
