// Numbers as they lie in memory, read into registers of float32 and written back: bfloat16, float16 and int8, and the
// four-bit weights of fastgpt/quantized_weight.py. Loads and stores with a count touch the first n numbers only.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fastgpt {
namespace FASTGPT_ISA {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

FASTGPT_INLINE float widened(BFloat16 b) {
    const uint32_t bits = static_cast<uint32_t>(b.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

#if defined(__AVX512F__)

FASTGPT_INLINE __m512 widened(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}
FASTGPT_INLINE __m256i at(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
FASTGPT_INLINE __m256i at(const void* p, int64_t n) { return _mm256_maskz_loadu_epi16(first(n), p); }
FASTGPT_INLINE Vec load(const BFloat16* p) { return {widened(at(p))}; }
FASTGPT_INLINE Vec load(const BFloat16* p, int64_t n) { return {widened(at(p, n))}; }
FASTGPT_INLINE Vec load(const Float16* p) { return {_mm512_cvtph_ps(at(p))}; }
FASTGPT_INLINE Vec load(const Float16* p, int64_t n) { return {_mm512_cvtph_ps(at(p, n))}; }
FASTGPT_INLINE Vec load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
FASTGPT_INLINE Vec load(const int8_t* p, int64_t n) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
}
// The low (shift 0) or high (shift 4) four bits of a register's width of bytes.
FASTGPT_INLINE Vec load_half_bytes(const uint8_t* p, int shift) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i half = _mm512_srl_epi32(bytes, _mm_cvtsi32_si128(shift));
    return {_mm512_cvtepi32_ps(_mm512_and_si512(half, _mm512_set1_epi32(15)))};
}
// To nearest, ties to even; a NaN stays one. The instruction for it takes subnormal numbers for 0.
FASTGPT_INLINE void store(BFloat16* p, Vec a, int64_t n) {
#ifdef FASTGPT_NARROW_DOTS
    _mm256_mask_storeu_epi16(p, first(n), (__m256i)_mm512_cvtneps_pbh(a.v));
#else
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtepi32_epi16(rounded));
#endif
}
FASTGPT_INLINE void store(Float16* p, Vec a, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

// In lanes, or whole registers where the instruction set has them; a short load goes through a copy of zeros.
#if defined(__AVX2__)

FASTGPT_INLINE __m128i at(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
FASTGPT_INLINE __m128i eight_bytes(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
FASTGPT_INLINE Vec load(const BFloat16* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(at(p)), 16))};
}
FASTGPT_INLINE Vec load(const Float16* p) { return {_mm256_cvtph_ps(at(p))}; }
FASTGPT_INLINE Vec load(const int8_t* p) { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes(p)))}; }
FASTGPT_INLINE Vec load_half_bytes(const uint8_t* p, int shift) {
    const __m256i half = _mm256_srl_epi32(_mm256_cvtepu8_epi32(eight_bytes(p)), _mm_cvtsi32_si128(shift));
    return {_mm256_cvtepi32_ps(_mm256_and_si256(half, _mm256_set1_epi32(15)))};
}
FASTGPT_INLINE void store(Float16* p, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__aarch64__)

FASTGPT_INLINE uint16x4_t at(const void* p) { return vld1_u16(static_cast<const uint16_t*>(p)); }
FASTGPT_INLINE uint64_t four_bytes(const void* p) {
    uint32_t r;
    std::memcpy(&r, p, sizeof r);
    return r;
}
FASTGPT_INLINE Vec load(const BFloat16* p) { return {vreinterpretq_f32_u32(vshll_n_u16(at(p), 16))}; }
FASTGPT_INLINE Vec load(const Float16* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(at(p)))}; }
FASTGPT_INLINE Vec load(const int8_t* p) {
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four_bytes(p))))))};
}
FASTGPT_INLINE Vec load_half_bytes(const uint8_t* p, int shift) {
    const uint8x8_t half = vshl_u8(vcreate_u8(four_bytes(p)), vdup_n_s8(static_cast<int8_t>(-shift)));
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vand_u8(half, vdup_n_u8(15))))))};
}
FASTGPT_INLINE void store(Float16* p, Vec a) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a.v)));
}

#else

typedef uint16_t HalfLanes __attribute__((vector_size(8)));
FASTGPT_INLINE WordLanes four_words(const void* p) {
    HalfLanes halves;
    std::memcpy(&halves, p, sizeof halves);
    return __builtin_convertvector(halves, WordLanes);
}
FASTGPT_INLINE Vec load(const BFloat16* p) { return {(Lanes)(four_words(p) << 16)}; }
FASTGPT_INLINE Vec load(const Float16* p) {
    const WordLanes bits = four_words(p), rest = bits & 0x7fff, magnitude = rest << 13;
    // Times 2^112 moves the exponent's bias from 15 to 127, subnormals included.
    const WordLanes finite = (WordLanes)((Lanes)magnitude * 5.192296858534828e33f);
    const WordLanes beyond = (WordLanes)(rest >= 0x7c00);  // infinities and NaNs
    return {(Lanes)(((magnitude | 0x7f800000) & beyond) | (finite & ~beyond) | (bits & 0x8000) << 16)};
}
FASTGPT_INLINE Float16 rounded_half(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t a = bits & 0x7fffffffu;
    uint32_t half;
    if (a > 0x7f800000u) {
        half = 0x7e00u;
    } else if (a < 0x38800000u) {  // subnormal: adding 0.5 rounds at its last bit
        float magnitude;
        std::memcpy(&magnitude, &a, sizeof magnitude);
        magnitude += 0.5f;
        std::memcpy(&half, &magnitude, sizeof half);
        half -= 0x3f000000u;
    } else {
        half = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
        half = half > 0x7c00u ? 0x7c00u : half;
    }
    return {static_cast<uint16_t>(sign | half)};
}
FASTGPT_INLINE void store(Float16* p, Vec a) {
    for (int i = 0; i < Vec::width; ++i) p[i] = rounded_half(a.v[i]);
}

#ifdef __SSE2__

// Four bytes, each the highest of its lane. Compilers make scalars of the same by conversion of a vector.
FASTGPT_INLINE __m128i high_bytes(const void* p) {
    int bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    const __m128i none = _mm_setzero_si128();
    return _mm_unpacklo_epi16(none, _mm_unpacklo_epi8(none, _mm_cvtsi32_si128(bytes)));
}
FASTGPT_INLINE Vec load(const int8_t* p) { return {_mm_cvtepi32_ps(_mm_srai_epi32(high_bytes(p), 24))}; }
FASTGPT_INLINE Vec load_half_bytes(const uint8_t* p, int shift) {
    const __m128i half = _mm_srl_epi32(high_bytes(p), _mm_cvtsi32_si128(24 + shift));
    return {_mm_cvtepi32_ps(_mm_and_si128(half, _mm_set1_epi32(15)))};
}

#else

FASTGPT_INLINE Vec load(const int8_t* p) {
    return lanes([&](int i) { return static_cast<float>(p[i]); });
}
FASTGPT_INLINE Vec load_half_bytes(const uint8_t* p, int shift) {
    return lanes([&](int i) { return static_cast<float>((p[i] >> shift) & 15); });
}

#endif
#endif

template <class T>
FASTGPT_INLINE Vec load(const T* p, int64_t n) {
    T whole[Vec::width] = {};
    for (int i = 0; i < Vec::width; i++)
        if (i < n) whole[i] = p[i];  // GCC 16 warns of a memcpy, in which it sees no bound for n
    return load(whole);
}
FASTGPT_INLINE void store(BFloat16* p, Vec a, int64_t n) {
    float wide[Vec::width];
    store(wide, a);
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, wide + i, sizeof bits);
        const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        p[i].bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
}
FASTGPT_INLINE void store(Float16* p, Vec a, int64_t n) {
    Float16 whole[Vec::width];
    store(whole, a);
    std::memcpy(p, whole, sizeof(Float16) * static_cast<size_t>(n));
}

#endif

// f(pointer of the numbers' type): for float32, bfloat16 and float16.
template <class F>
FASTGPT_INLINE auto as_type(int64_t format, const void* p, F f) {
    if (format == kBFloat16) return f(static_cast<const BFloat16*>(p));
    if (format == kFloat16) return f(static_cast<const Float16*>(p));
    return f(static_cast<const float*>(p));
}

FASTGPT_INLINE Vec load(const Numbers& p, int64_t i, int64_t n) {
    return as_type(p.format, p.at, [&](const auto* at) { return n == Vec::width ? load(at + i) : load(at + i, n); });
}
FASTGPT_INLINE void store(int64_t format, void* p, int64_t i, Vec a, int64_t n) {
    if (format == kBFloat16) return store(static_cast<BFloat16*>(p) + i, a, n);
    if (format == kFloat16) return store(static_cast<Float16*>(p) + i, a, n);
    store_part(static_cast<float*>(p) + i, a, n);
}

// Bytes of n neighbours.
FASTGPT_INLINE int64_t bytes(int64_t format, int64_t n) {
    return format == kInt4 ? n / 2 : format >= kInt8 ? n : format == kFloat32 ? 4 * n : 2 * n;
}
FASTGPT_INLINE const void* moved(const void* p, int64_t by) { return static_cast<const char*>(p) + by; }
FASTGPT_INLINE void* moved(void* p, int64_t by) { return static_cast<char*>(p) + by; }
FASTGPT_INLINE Numbers from(const Numbers& p, int64_t i) {
    return p.at ? Numbers{moved(p.at, bytes(p.format, i)), p.format} : p;
}

// A row of a weight, read in float32 from column k on; without its scale where that is one for the row.
template <class T>
struct WeightRow {
    const T* at;

    WeightRow() = default;
    WeightRow(const Weight& w, int64_t row) : at(static_cast<const T*>(w.at) + row * w.row) {}
    FASTGPT_ALWAYS_INLINE Vec operator()(int64_t k) const { return load(at + k); }
    FASTGPT_ALWAYS_INLINE Vec operator()(int64_t k, int64_t n) const { return load(at + k, n); }
    FASTGPT_ALWAYS_INLINE const void* address(int64_t k) const { return at + k; }
};

struct Int4 {};  // two in a byte

// Within 32 neighbours byte j holds number j in its low and number j + 16 in its high four bits.
template <>
struct WeightRow<Int4> {
    const uint8_t* at;
    const BFloat16 *scale, *minimum;
    int shift;  // from a column to its group: a group has a power of 2

    WeightRow() = default;
    WeightRow(const Weight& w, int64_t row)
        : at(static_cast<const uint8_t*>(w.at) + row * w.row / 2),
          scale(static_cast<const BFloat16*>(w.scale) + row * w.row / w.group),
          minimum(static_cast<const BFloat16*>(w.minimum) + row * w.row / w.group),
          shift(w.group == 32 ? 5 : 6) {}
    FASTGPT_ALWAYS_INLINE Vec operator()(int64_t k) const {
        const Vec q = load_half_bytes(at + (k >> 5) * 16 + (k & 15), k & 16 ? 4 : 0);
        const int64_t g = k >> shift;
        return fma(q, broadcast(widened(scale[g])), broadcast(widened(minimum[g])));
    }
    FASTGPT_ALWAYS_INLINE Vec operator()(int64_t k, int64_t) const { return (*this)(k); }  // whole groups alone
    FASTGPT_ALWAYS_INLINE const void* address(int64_t k) const { return at + k / 2; }
};

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;
template <class T>
constexpr bool quantised = same<T, int8_t> || same<T, Int4>;

// f(a type): that of WeightRow for the weight.
template <class F>
FASTGPT_INLINE void with_rows(const Weight& w, F f) {
    switch (w.format) {
        case kBFloat16:
            return f(BFloat16{});
        case kFloat16:
            return f(Float16{});
        case kInt8:
        case kInt8Dynamic:
            return f(int8_t{});
        case kInt4:
            return f(Int4{});
        default:
            return f(float{});
    }
}

FASTGPT_INLINE bool has_row_scale(const Weight& w) { return w.format == kInt8 || w.format == kInt8Dynamic; }

// The weight from row n on.
inline Weight rows_from(Weight w, int64_t n) {
    w.at = moved(w.at, bytes(w.format, n * w.row));
    if (w.format == kInt4) {
        w.scale = static_cast<const BFloat16*>(w.scale) + n * w.row / w.group;
        w.minimum = static_cast<const BFloat16*>(w.minimum) + n * w.row / w.group;
    } else if (w.scale) {
        w.scale = static_cast<const float*>(w.scale) + n;
    }
    return w;
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
