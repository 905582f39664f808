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

// Philox4x32-10 under the key `seed` for the counters (first + l, row's two halves, site), l < 16:
// word w of counter l into out[16 w + l].
inline void philox16(uint64_t seed, uint32_t first, uint64_t row, uint32_t site, uint32_t (&out)[kDropoutGroup]) {
    constexpr int L = 16;
    uint32_t c0[L], c1[L], c2[L], c3[L];
    for (int l = 0; l < L; ++l) {
        c0[l] = first + static_cast<uint32_t>(l), c1[l] = static_cast<uint32_t>(row);
        c2[l] = static_cast<uint32_t>(row >> 32), c3[l] = site;
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int l = 0; l < L; ++l) {
            const uint64_t a = uint64_t{0xD2511F53} * c0[l], b = uint64_t{0xCD9E8D57} * c2[l];
            c0[l] = static_cast<uint32_t>(b >> 32) ^ c1[l] ^ k0, c1[l] = static_cast<uint32_t>(b);
            c2[l] = static_cast<uint32_t>(a >> 32) ^ c3[l] ^ k1, c3[l] = static_cast<uint32_t>(a);
        }
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int l = 0; l < L; ++l) out[l] = c0[l], out[16 + l] = c1[l], out[32 + l] = c2[l], out[48 + l] = c3[l];
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
