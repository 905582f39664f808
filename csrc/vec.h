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

namespace fastgpt {
namespace FASTGPT_ISA {

#if defined(__AVX512F__)

struct Vec {
    static constexpr int W = 16;  // lanes
    __m512 v;

    static __mmask16 mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
    static Vec set(float s) { return {_mm512_set1_ps(s)}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
};
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Where a lane of b is not a number, so is the result's: both instructions return their second operand then.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec scale_by_power_of_2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

#elif defined(__AVX2__)

struct Vec {
    static constexpr int W = 8;
    __m256 v;

    static __m256i mask(int64_t n) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
    }
    static Vec set(float s) { return {_mm256_set1_ps(s)}; }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, mask(n))}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, mask(n), v); }
};
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline __m256 power_of_2(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// In two factors: 2^n alone would leave the range of float32 where the product still lies in it.
inline Vec scale_by_power_of_2(Vec a, Vec n) {
    const __m256i i = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(i, 1);
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, power_of_2(half)), power_of_2(_mm256_sub_epi32(i, half)))};
}
inline __m128 fold(__m256 a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
inline float sum(Vec a) {
    __m128 s = fold(a.v);
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(Vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

#else  // baseline: four lanes in plain C++, which compilers turn into SSE2 or NEON

struct Vec {
    static constexpr int W = 4;
    float v[W];

    static Vec set(float s) { return {{s, s, s, s}}; }
    static Vec load(const float* p) {
        Vec r;
        std::memcpy(r.v, p, sizeof r.v);
        return r;
    }
    static Vec load(const float* p, int64_t n) {
        Vec r = set(0.0f);
        for (int64_t i = 0; i < n; ++i) r.v[i] = p[i];
        return r;
    }
    void store(float* p) const { std::memcpy(p, v, sizeof v); }
    void store(float* p, int64_t n) const {
        for (int64_t i = 0; i < n; ++i) p[i] = v[i];
    }
};
template <class F>
inline Vec lanes(F f) {
    Vec r;
    for (int i = 0; i < Vec::W; ++i) r.v[i] = f(i);
    return r;
}
inline Vec operator+(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec max(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// Adding 1.5 * 2^23 leaves no bit for a fraction; right for |a| < 2^22, and the callers clamp first.
inline Vec round(Vec a) {
    const float shift = 12582912.0f;
    return lanes([&](int i) { return (a.v[i] + shift) - shift; });
}
inline float power_of_2(int32_t n) {
    const int32_t bits = (n + 127) * (1 << 23);
    float r;
    std::memcpy(&r, &bits, sizeof r);
    return r;
}
inline Vec scale_by_power_of_2(Vec a, Vec n) {
    return lanes([&](int i) {
        const int32_t whole = n.v[i] == n.v[i] ? static_cast<int32_t>(n.v[i]) : 0, half = whole >> 1;
        return a.v[i] * power_of_2(half) * power_of_2(whole - half);
    });
}
inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float largest(Vec a) {
    float m = a.v[0];
    for (int i = 1; i < Vec::W; ++i) m = a.v[i] > m ? a.v[i] : m;
    return m;
}

#endif

// e^x to about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial of degree 7 in r (Cephes expf), times 2^n.
// Overflows to infinity, underflows through the subnormals to 0, and a NaN goes through.
inline Vec exp(Vec x) {
    x = min(Vec::set(89.0f), max(Vec::set(-104.5f), x));
    const Vec n = round(x * Vec::set(1.44269504088896341f));
    const Vec r = fma(n, Vec::set(2.12194440e-4f), fma(n, Vec::set(-0.693359375f), x));
    Vec p = Vec::set(1.9875691500e-4f);
    p = fma(p, r, Vec::set(1.3981999507e-3f));
    p = fma(p, r, Vec::set(8.3334519073e-3f));
    p = fma(p, r, Vec::set(4.1665795894e-2f));
    p = fma(p, r, Vec::set(1.6666665459e-1f));
    p = fma(p, r, Vec::set(5.0000001201e-1f));
    p = fma(p, r * r, r + Vec::set(1.0f));
    return scale_by_power_of_2(p, n);
}

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
