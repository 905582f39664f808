// Dropout whose mask is a function of a seed and a place, so that the backward pass makes it again and nobody keeps it:
// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011). The mask is the same on every
// instruction set, for any number of threads, and in the Triton kernels (fastgpt/triton/dropout.py).
//
// One call of the generator serves four neighbours of a row; call c is counter c of the key `seed`, and a row of n
// columns takes ceil(n / 4) calls behind those of the rows before it.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "vec.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int64_t kDropoutGroup = 64;  // columns whose numbers are drawn together

#if defined(__AVX512F__)
struct Words {
    static constexpr int lanes = 16;
    __m512i v;
};
FASTGPT_INLINE Words words(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
FASTGPT_INLINE Words load_words(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
FASTGPT_INLINE void store(uint32_t* p, Words a) { _mm512_storeu_si512(p, a.v); }
FASTGPT_INLINE Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
FASTGPT_INLINE Words operator+(Words a, Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
// The halves of the 64-bit products of a and m.
FASTGPT_INLINE void multiply(Words a, Words m, Words& high, Words& low) {
    const __m512i even = _mm512_mul_epu32(a.v, m.v), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), m.v);
    high.v = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    low.v = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}
FASTGPT_INLINE void store_interleaved(uint32_t* p, Words a, Words b, Words c, Words d) {
    const __m512i ab0 = _mm512_unpacklo_epi32(a.v, b.v), cd0 = _mm512_unpacklo_epi32(c.v, d.v);
    const __m512i ab1 = _mm512_unpackhi_epi32(a.v, b.v), cd1 = _mm512_unpackhi_epi32(c.v, d.v);
    _mm512_storeu_si512(p, _mm512_unpacklo_epi64(ab0, cd0)),
        _mm512_storeu_si512(p + 16, _mm512_unpackhi_epi64(ab0, cd0));
    _mm512_storeu_si512(p + 32, _mm512_unpacklo_epi64(ab1, cd1));
    _mm512_storeu_si512(p + 48, _mm512_unpackhi_epi64(ab1, cd1));
}
// to[i] = scale where the number's 31 bits, those of its complement if it is negative, are at least `least`; else 0.
FASTGPT_INLINE void store_kept(float* to, Words number, int32_t least, float scale) {
    const __m512i bits = _mm512_xor_si512(number.v, _mm512_srai_epi32(number.v, 31));
    const __mmask16 kept = _mm512_cmpge_epi32_mask(bits, _mm512_set1_epi32(least));
    _mm512_storeu_ps(to, _mm512_maskz_mov_ps(kept, _mm512_set1_ps(scale)));
}
#elif defined(__AVX2__)
struct Words {
    static constexpr int lanes = 8;
    __m256i v;
};
FASTGPT_INLINE Words words(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
FASTGPT_INLINE Words load_words(const uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
FASTGPT_INLINE void store(uint32_t* p, Words a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
FASTGPT_INLINE Words operator^(Words a, Words b) { return {_mm256_xor_si256(a.v, b.v)}; }
FASTGPT_INLINE Words operator+(Words a, Words b) { return {_mm256_add_epi32(a.v, b.v)}; }
FASTGPT_INLINE void multiply(Words a, Words m, Words& high, Words& low) {
    const __m256i even = _mm256_mul_epu32(a.v, m.v), odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), m.v);
    high.v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low.v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
FASTGPT_INLINE void store_interleaved(uint32_t* p, Words a, Words b, Words c, Words d) {
    const __m256i ab0 = _mm256_unpacklo_epi32(a.v, b.v), cd0 = _mm256_unpacklo_epi32(c.v, d.v);
    const __m256i ab1 = _mm256_unpackhi_epi32(a.v, b.v), cd1 = _mm256_unpackhi_epi32(c.v, d.v);
    store(p, {_mm256_unpacklo_epi64(ab0, cd0)}), store(p + 8, {_mm256_unpackhi_epi64(ab0, cd0)});
    store(p + 16, {_mm256_unpacklo_epi64(ab1, cd1)}), store(p + 24, {_mm256_unpackhi_epi64(ab1, cd1)});
}
FASTGPT_INLINE void store_kept(float* to, Words number, int32_t least, float scale) {
    const __m256i bits = _mm256_xor_si256(number.v, _mm256_srai_epi32(number.v, 31));
    const __m256i dropped = _mm256_cmpgt_epi32(_mm256_set1_epi32(least), bits);
    _mm256_storeu_ps(to, _mm256_andnot_ps(_mm256_castsi256_ps(dropped), _mm256_set1_ps(scale)));
}
#else
struct Words {
    static constexpr int lanes = 1;
    uint32_t v;
};
FASTGPT_INLINE Words words(uint32_t x) { return {x}; }
FASTGPT_INLINE Words load_words(const uint32_t* p) { return {*p}; }
FASTGPT_INLINE void store(uint32_t* p, Words a) { *p = a.v; }
FASTGPT_INLINE Words operator^(Words a, Words b) { return {a.v ^ b.v}; }
FASTGPT_INLINE Words operator+(Words a, Words b) { return {a.v + b.v}; }
FASTGPT_INLINE void multiply(Words a, Words m, Words& high, Words& low) {
    const uint64_t product = uint64_t{a.v} * m.v;
    high.v = static_cast<uint32_t>(product >> 32), low.v = static_cast<uint32_t>(product);
}
FASTGPT_INLINE void store_interleaved(uint32_t* p, Words a, Words b, Words c, Words d) {
    p[0] = a.v, p[1] = b.v, p[2] = c.v, p[3] = d.v;
}
FASTGPT_INLINE void store_kept(float* to, Words number, int32_t least, float scale) {
    const int32_t drawn = static_cast<int32_t>(number.v);
    *to = (drawn < 0 ? ~drawn : drawn) >= least ? scale : 0.0f;
}
#endif

// The counter of each lane, less the first: the order in which store_interleaved lays the lanes side by side.
struct LaneOrder {
    uint32_t lane[Words::lanes];
    constexpr LaneOrder() : lane() {
        constexpr uint32_t L = Words::lanes;
        for (uint32_t l = 0; l < L; ++l) lane[l] = L > 1 ? l % 4 * (L / 4) + l / 4 : 0;
    }
};

// Philox4x32-10 under the key `seed` for the counters first + l, l < 16: its four words into out[4 l] .. out[4 l + 3].
inline void philox16(uint64_t seed, uint64_t first, uint32_t (&out)[kDropoutGroup]) {
    static constexpr LaneOrder order;
    for (int l = 0; l < 16; l += Words::lanes) {
        const uint64_t counter = first + static_cast<uint64_t>(l);
        const uint32_t low = static_cast<uint32_t>(counter), high = static_cast<uint32_t>(counter >> 32);
        Words c0 = words(low) + load_words(order.lane), c1 = words(high), c2 = words(0), c3 = words(0);
        if (low + (Words::lanes - 1) < low) {  // some lanes carry
            uint32_t carried[Words::lanes];
            for (int i = 0; i < Words::lanes; ++i) carried[i] = high + (low + order.lane[i] < low ? 1 : 0);
            c1 = load_words(carried);
        }
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            Words high0, low0, high2, low2;
            multiply(c0, words(0xD2511F53), high0, low0);
            multiply(c2, words(0xCD9E8D57), high2, low2);
            c0 = high2 ^ c1 ^ words(k0), c1 = low2;
            c2 = high0 ^ c3 ^ words(k1), c3 = low0;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        store_interleaved(out + 4 * l, c0, c1, c2, c3);
    }
}

// One dropout of one call, on rows of `cols` columns.
struct Dropout {
    uint64_t seed = 0, calls = 0;  // of the generator, for a row
    uint32_t threshold = 0;        // a number of 31 bits below it drops its element; 0: nothing is dropped
    float scale = 1.0f;            // of what stays

    Dropout() = default;
    Dropout(int64_t seed_, double p, int64_t cols)
        : seed(static_cast<uint64_t>(seed_)),
          calls(static_cast<uint64_t>((cols + 3) / 4)),
          threshold(least_kept(p)),
          scale(p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f) {}

    bool on() const { return threshold > 0; }

    // The least number that is kept. The generator's 31 bits are compared with p as the GPU does it, in float32.
    static uint32_t least_kept(double p) {
        uint32_t low = 0, high = uint32_t{1} << 31;
        while (low < high) {
            const uint32_t middle = low + (high - low) / 2;
            if (static_cast<float>(middle) * 4.6566127342e-10f >= static_cast<float>(p))
                high = middle;
            else
                low = middle + 1;
        }
        return low;
    }

    // The factors, 0 or 1 / (1 - p), of columns [64 group, 64 group + 64) of a row.
    void factors(int64_t row, int64_t group, float (&keep)[kDropoutGroup]) const {
        uint32_t number[kDropoutGroup];
        philox16(seed, static_cast<uint64_t>(row) * calls + static_cast<uint64_t>(16 * group), number);
        // Where the threshold is 2^31, scale is 0 anyway.
        const int32_t least = static_cast<int32_t>(min(threshold, 0x7fffffff));
        for (int i = 0; i < kDropoutGroup; i += Words::lanes)
            store_kept(keep + i, load_words(number + i), least, scale);
    }

    // Multiplies the first n <= 64 of group `group` of a row, at x, by their factors.
    void group(int64_t row, int64_t group, float* x, int64_t n) const {
        float keep[kDropoutGroup];
        factors(row, group, keep);
        for_each_vec(
            n, [&](int64_t c, int64_t part) { store_part(x + c, load_part(x + c, part) * load(keep + c), part); });
    }

    // y = residual + factors * x for a row of n columns; residual may be null, y any of the others.
    void row(int64_t row, const float* x, const float* residual, float* y, int64_t n) const {
        float keep[kDropoutGroup];
        for (int64_t c0 = 0; c0 < n; c0 += kDropoutGroup) {
            factors(row, c0 / kDropoutGroup, keep);
            for_each_vec(min(kDropoutGroup, n - c0), [&](int64_t c, int64_t part) {
                const Vec v = load_part(x + c0 + c, part) * load(keep + c);
                store_part(y + c0 + c, residual ? v + load_part(residual + c0 + c, part) : v, part);
            });
        }
    }
};

// x *= the factors of [rows, cols].
inline void dropout(float* x, int64_t rows, int64_t cols, int64_t seed, double p, int threads) {
    const Dropout drop(seed, p, cols);
    parallel_for(rows, max(1, 16384 / max(1, cols)), threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end && drop.on(); ++r) drop.row(r, x + r * cols, nullptr, x + r * cols, cols);
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
