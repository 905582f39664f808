// Four lanes: NEON, and elsewhere what the compilers' vector extension makes of them, SSE2 on x86.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastgpt {
namespace FASTGPT_ISA {

typedef float Lanes __attribute__((vector_size(16)));
typedef int32_t IntLanes __attribute__((vector_size(16)));
typedef uint32_t WordLanes __attribute__((vector_size(16)));

FASTGPT_INLINE IntLanes to_ints(Lanes a) { return __builtin_convertvector(a, IntLanes); }
FASTGPT_INLINE Lanes power_of_2(IntLanes n) { return (Lanes)((WordLanes)(n + 127) << 23); }

struct Vec {
    static constexpr int width = 4;
#ifdef __aarch64__
    static constexpr int registers = 32;
#else
    static constexpr int registers = 16;
#endif
    Lanes v;
};

template <class F>
FASTGPT_INLINE Vec lanes(F f) {
    return {Lanes{f(0), f(1), f(2), f(3)}};
}
FASTGPT_INLINE Vec broadcast(float s) { return {Lanes{s, s, s, s}}; }
#ifdef __aarch64__
FASTGPT_INLINE Vec load(const float* p) { return {vld1q_f32(p)}; }
FASTGPT_INLINE void store(float* p, Vec a) { vst1q_f32(p, a.v); }
#else
FASTGPT_INLINE Vec load(const float* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
}
FASTGPT_INLINE void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof a.v); }
#endif
FASTGPT_INLINE Vec load(const float* p, int64_t n) {
    if (n == Vec::width) return load(p);
    return lanes([&](int64_t i) { return i < n ? p[i] : 0.0f; });
}
FASTGPT_INLINE void store(float* p, Vec a, int64_t n) {
    if (n == Vec::width) return store(p, a);
    for (int i = 0; i < Vec::width; ++i)
        if (i < n) p[i] = a.v[i];
}
FASTGPT_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
FASTGPT_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
FASTGPT_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
FASTGPT_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
FASTGPT_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
FASTGPT_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }

#ifdef __aarch64__

FASTGPT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
FASTGPT_INLINE Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
FASTGPT_INLINE float sum(Vec a) { return vaddvq_f32(a.v); }
FASTGPT_INLINE float largest(Vec a) { return vmaxvq_f32(a.v); }
FASTGPT_INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v)));
}

#else

FASTGPT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
// Adding 1.5 * 2^23 leaves no bit for a fraction; right for |a| < 2^22, and the callers clamp first.
FASTGPT_INLINE Vec round(Vec a) {
    const Vec shift = broadcast(12582912.0f);
    return (a + shift) - shift;
}
FASTGPT_INLINE float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
FASTGPT_INLINE float largest(Vec a) {
    float m = a.v[0];
    for (int i = 1; i < Vec::width; ++i) m = a.v[i] > m ? a.v[i] : m;
    return m;
}
FASTGPT_INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    const Lanes ab = Lanes{a.v[0], b.v[0], a.v[1], b.v[1]} + Lanes{a.v[2], b.v[2], a.v[3], b.v[3]};
    const Lanes cd = Lanes{c.v[0], d.v[0], c.v[1], d.v[1]} + Lanes{c.v[2], d.v[2], c.v[3], d.v[3]};
    store(out, {Lanes{ab[0], ab[1], cd[0], cd[1]} + Lanes{ab[2], ab[3], cd[2], cd[3]}});
}

#endif

// In two factors: 2^n alone would leave the range of float32 where the product still lies in it.
FASTGPT_INLINE Vec scale_by_power_of_2(Vec a, Vec n) {
    const IntLanes whole = to_ints(n.v), half = whole >> 1;
    return {a.v * power_of_2(half) * power_of_2(whole - half)};
}

FASTGPT_INLINE void transpose(const Vec (&src)[4], float* dst, int64_t dst_stride) {
    const Lanes a = src[0].v, b = src[1].v, c = src[2].v, d = src[3].v;
    const Lanes ab0 = {a[0], b[0], a[1], b[1]}, ab2 = {a[2], b[2], a[3], b[3]};
    const Lanes cd0 = {c[0], d[0], c[1], d[1]}, cd2 = {c[2], d[2], c[3], d[3]};
    store(dst, {Lanes{ab0[0], ab0[1], cd0[0], cd0[1]}});
    store(dst + dst_stride, {Lanes{ab0[2], ab0[3], cd0[2], cd0[3]}});
    store(dst + 2 * dst_stride, {Lanes{ab2[0], ab2[1], cd2[0], cd2[1]}});
    store(dst + 3 * dst_stride, {Lanes{ab2[2], ab2[3], cd2[2], cd2[3]}});
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
