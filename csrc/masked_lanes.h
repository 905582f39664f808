// Masked loads and stores lane by lane. The sanitizers do not watch the instructions for them, so in their builds
// (vec.h) these stand in for the intrinsics: the same lanes of the same mask, each read or written by itself. Not
// inlined, which would take minutes to compile.
#pragma once

#include <immintrin.h>

namespace fastgpt {
namespace FASTGPT_ISA {

template <class Register, class Lane>
[[gnu::noinline]] static Register load_lanes(uint64_t mask, const void* p) {
    Lane lanes[sizeof(Register) / sizeof(Lane)] = {};
    for (uint64_t i = 0; i < sizeof(Register) / sizeof(Lane); ++i)
        if (mask >> i & 1) std::memcpy(lanes + i, static_cast<const Lane*>(p) + i, sizeof(Lane));
    Register r;
    std::memcpy(&r, lanes, sizeof r);
    return r;
}

template <class Lane, class Register>
[[gnu::noinline]] static void store_lanes(void* p, uint64_t mask, Register r) {
    Lane lanes[sizeof(Register) / sizeof(Lane)];
    std::memcpy(lanes, &r, sizeof r);
    for (uint64_t i = 0; i < sizeof(Register) / sizeof(Lane); ++i)
        if (mask >> i & 1) std::memcpy(static_cast<Lane*>(p) + i, lanes + i, sizeof(Lane));
}

// AVX2's mask is the sign of each lane.
FASTGPT_INLINE uint64_t signs(__m256i mask) {
    return static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

#define _mm256_maskload_ps(p, mask) load_lanes<__m256, float>(signs(mask), p)
#define _mm256_maskstore_ps(p, mask, v) store_lanes<float>(p, signs(mask), v)
#define _mm512_maskz_loadu_ps(mask, p) load_lanes<__m512, float>(mask, p)
#define _mm512_mask_storeu_ps(p, mask, v) store_lanes<float>(p, mask, v)
#define _mm256_maskz_loadu_epi16(mask, p) load_lanes<__m256i, uint16_t>(mask, p)
#define _mm256_mask_storeu_epi16(p, mask, v) store_lanes<uint16_t>(p, mask, v)
#define _mm512_maskz_loadu_epi16(mask, p) load_lanes<__m512i, uint16_t>(mask, p)
#define _mm_maskz_loadu_epi8(mask, p) load_lanes<__m128i, uint8_t>(mask, p)
#define _mm512_maskz_loadu_epi8(mask, p) load_lanes<__m512i, uint8_t>(mask, p)
