// Dropout whose mask is a function of a seed and a place, so that the backward pass makes it again and nobody keeps it:
// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).
//
// One call of the generator's sixteen counters gives the 64 numbers of one row's columns [64 g, 64 g + 64), the same on
// every instruction set and for any number of threads.
#pragma once

#include <cstdint>

#include "vec.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int64_t kDropoutGroup = 64;
enum Site : uint32_t { kBranchSite, kAttentionSite, kShortcut1Site, kShortcut2Site };  // the dropouts of one seed

#if defined(__AVX512F__)
struct Words {
    static constexpr int lanes = 16;
    __m512i v;
};
FASTGPT_INLINE Words words(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
FASTGPT_INLINE Words load_words(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
FASTGPT_INLINE void store(uint32_t* p, Words a) { _mm512_storeu_si512(p, a.v); }
FASTGPT_INLINE Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
// The halves of the 64-bit products of a and m.
FASTGPT_INLINE void multiply(Words a, Words m, Words& high, Words& low) {
    const __m512i even = _mm512_mul_epu32(a.v, m.v), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), m.v);
    high.v = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    low.v = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
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
FASTGPT_INLINE void multiply(Words a, Words m, Words& high, Words& low) {
    const __m256i even = _mm256_mul_epu32(a.v, m.v), odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), m.v);
    high.v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low.v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
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
FASTGPT_INLINE void multiply(Words a, Words m, Words& high, Words& low) {
    const uint64_t product = uint64_t{a.v} * m.v;
    high.v = static_cast<uint32_t>(product >> 32), low.v = static_cast<uint32_t>(product);
}
#endif

// Philox4x32-10 under the key `seed` for the counters (first + l, row's two halves, site), l < 16:
// word w of counter l into out[16 w + l].
inline void philox16(uint64_t seed, uint32_t first, uint64_t row, uint32_t site, uint32_t (&out)[kDropoutGroup]) {
    constexpr int L = Words::lanes;
    uint32_t counters[16];
    for (int l = 0; l < 16; ++l) counters[l] = first + static_cast<uint32_t>(l);
    for (int l = 0; l < 16; l += L) {
        Words c0 = load_words(counters + l), c1 = words(static_cast<uint32_t>(row));
        Words c2 = words(static_cast<uint32_t>(row >> 32)), c3 = words(site);
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            Words high0, low0, high2, low2;
            multiply(c0, words(0xD2511F53), high0, low0);
            multiply(c2, words(0xCD9E8D57), high2, low2);
            c0 = high2 ^ c1 ^ words(k0), c1 = low2;
            c2 = high0 ^ c3 ^ words(k1), c3 = low0;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        store(out + l, c0), store(out + 16 + l, c1), store(out + 32 + l, c2), store(out + 48 + l, c3);
    }
}

// One dropout of one call: what stands at `site` of it is dropped where its number is under the threshold of 2^32.
struct Dropout {
    uint64_t seed;
    int64_t threshold;  // 0: drops nothing
    uint32_t site;

    bool on() const { return threshold > 0; }

    // The factors, 0 or 1 / (1 - p), of columns [64 group, 64 group + 64) of a row.
    void factors(uint64_t row, int64_t group, float (&keep)[kDropoutGroup]) const {
        uint32_t number[kDropoutGroup];
        philox16(seed, static_cast<uint32_t>(16 * group), row, site, number);
        const float p = static_cast<float>(threshold) / 4294967296.0f, scale = p < 1.0f ? 1.0f / (1.0f - p) : 0.0f;
        const uint32_t under = static_cast<uint32_t>(threshold > 0xffffffff ? 0xffffffff : threshold);
        for (int i = 0; i < kDropoutGroup; ++i) keep[i] = number[i] >= under ? scale : 0.0f;
        if (scale == 0.0f) std::memset(keep, 0, sizeof keep);
    }

    // Multiplies the first n <= 64 of group `group` of a row, at x, by their factors.
    void group(uint64_t row, int64_t group, float* x, int64_t n) const {
        float keep[kDropoutGroup];
        factors(row, group, keep);
        for_each_vec(
            n, [&](int64_t c, int64_t part) { store_part(x + c, load_part(x + c, part) * load(keep + c), part); });
    }

    // y = residual + factors * x for a row of n columns; residual may be null, y any of the others.
    void row(uint64_t row, const float* x, const float* residual, float* y, int64_t n) const {
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

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
