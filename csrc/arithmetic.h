// How a product takes its factors, a unit of 32 bits at a time: one float32, a pair of bfloat16 or four of int8.
#pragma once

#include <math.h>

#include "numbers.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// Of each arithmetic: the numbers in a unit; the sum of products so far plus one more, and its value in float32; and a
// register of a row's units from column k on, or of its first n numbers with zeros behind them.
struct Single {
    static constexpr int in_unit = 1;
    using Sum = Vec;
    FASTGPT_INLINE Sum nothing() { return zero(); }
    FASTGPT_INLINE Vec add_product(Vec sum, Vec x, Vec w) { return fma(x, w, sum); }
    FASTGPT_INLINE Vec value(Vec sum) { return sum; }
    template <class Row>
    FASTGPT_INLINE Vec units(const Row& w, int64_t k) {
        return w(k);
    }
    template <class Row>
    FASTGPT_INLINE Vec units(const Row& w, int64_t k, int64_t n) {
        return w(k, n);
    }
    // Of a column-major weight: a register of columns' units, from row k on.
    template <class T>
    FASTGPT_INLINE Vec column_units(const T* w, int64_t, int64_t, int64_t n) {
        return n == Vec::width ? load(w) : load(w, n);
    }
};

#ifdef FASTGPT_NARROW_DOTS

struct Pairs {
    static constexpr int in_unit = 2;
    using Sum = Vec;
    FASTGPT_INLINE Sum nothing() { return zero(); }
    FASTGPT_INLINE Vec add_product(Vec sum, Vec x, Vec w) {
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)x.v, (__m512bh)w.v)};
    }
    FASTGPT_INLINE Vec value(Vec sum) { return sum; }
    FASTGPT_INLINE Vec rounded(Vec first, Vec second) { return {(__m512)_mm512_cvtne2ps_pbh(second.v, first.v)}; }
    template <class Row>
    FASTGPT_INLINE Vec units(const Row& w, int64_t k) {
        return rounded(w(k), w(k + 16));
    }
    template <class Row>
    FASTGPT_INLINE Vec units(const Row& w, int64_t k, int64_t n) {
        return n > 16 ? rounded(w(k), w(k + 16, n - 16)) : rounded(w(k, n), zero());
    }
    FASTGPT_INLINE Vec units(const WeightRow<BFloat16>& w, int64_t k) { return {_mm512_loadu_ps(w.address(k))}; }
    FASTGPT_INLINE Vec units(const WeightRow<BFloat16>& w, int64_t k, int64_t n) {
        return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1u : ~0u, w.address(k)))};
    }
    // A weight in four bits is looked up: in what the 16 numbers of its group stand for, rounded once.
    FASTGPT_INLINE Vec units(const WeightRow<Int4>& w, int64_t k) {
        const auto wide = [](BFloat16 b) {
            return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(static_cast<int16_t>(b.bits)), 16));
        };
        const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512 values = _mm512_fmadd_ps(numbers, wide(w.scale[k >> w.shift]), wide(w.minimum[k >> w.shift]));
        return look_up(w, k, (__m256i)_mm512_cvtneps_pbh(values));
    }
    FASTGPT_INLINE Vec units(const WeightRow<Int4>& w, int64_t k, int64_t) { return units(w, k); }
    // The numbers themselves.
    FASTGPT_INLINE Vec steps(const WeightRow<Int4>& w, int64_t k) {
        return look_up(w, k,
                       _mm256_setr_epi16(0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110,
                                         0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170));
    }
    FASTGPT_INLINE Vec look_up(const WeightRow<Int4>& w, int64_t k, __m256i table) {
        const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(w.address(k))));
        const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
        const __m512i halves = _mm512_srlv_epi16(_mm512_broadcast_i64x4(bytes), shifts);
        // By the low five bits of each: the table stands there twice.
        return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(halves, _mm512_broadcast_i64x4(table)))};
    }
    FASTGPT_INLINE Vec lane_of(Vec v, int64_t lane) {
        return {_mm512_permutexvar_ps(_mm512_set1_epi32(static_cast<int>(lane)), v.v)};
    }
    template <class T>
    FASTGPT_INLINE Vec column_units(const T* w, int64_t w_col, int64_t numbers, int64_t n) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load_columns(w, n).v));
        if (numbers == 1) return {_mm512_castsi512_ps(low)};
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load_columns(w + w_col, n).v));
        return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
    }
    template <class T>
    FASTGPT_INLINE Vec load_columns(const T* w, int64_t n) {
        return n == Vec::width ? load(w) : load(w, n);
    }
};

// Weights as unsigned numbers, 128 more than they are, which `RowScale::offset` takes off again.
struct Quads {
    static constexpr int in_unit = 4;
    struct Sum {
        __m512i v;
    };
    FASTGPT_INLINE Sum nothing() { return {_mm512_setzero_si512()}; }
    FASTGPT_INLINE Sum add_product(Sum sum, Vec x, Vec w) {
        asm("vpdpbusd %2, %1, %0"
            : "+v"(sum.v)
            : "v"(w.v), "v"(x.v));  // by its intrinsic GCC 12 keeps sums on the stack
        return sum;
    }
    FASTGPT_INLINE Vec value(Sum sum) { return {_mm512_cvtepi32_ps(sum.v)}; }
    FASTGPT_INLINE Vec unsigned_bytes(__m512i w) {
        return {_mm512_castsi512_ps(_mm512_xor_si512(w, _mm512_set1_epi8(-128)))};
    }
    FASTGPT_INLINE Vec units(const WeightRow<int8_t>& w, int64_t k) {
        return unsigned_bytes(_mm512_loadu_si512(w.address(k)));
    }
    FASTGPT_INLINE Vec units(const WeightRow<int8_t>& w, int64_t k, int64_t n) {
        return unsigned_bytes(_mm512_maskz_loadu_epi8(n < 64 ? (1ull << n) - 1ull : ~0ull, w.address(k)));
    }
};

#endif

// Units in a row of k numbers, and the stride of such rows.
template <class A>
FASTGPT_INLINE int64_t units_of(int64_t k) {
    return up(k, A::in_unit);
}
FASTGPT_INLINE int64_t unit_row(int64_t units) { return up(units, 16) * 16; }

// What a row of sums is multiplied by once `offset` is taken off, where activations are int8.
struct RowScale {
    float scale, offset;
};

// The scale of a row of int8 activations: the largest becomes 127.
inline float row_scale(const float* x, int64_t k) {
    Vec high = zero(), odd = zero();  // maxima lose a NaN, this sum does not
    for_each_vec(k, [&](int64_t j, int64_t n) {
        const Vec v = load_part(x + j, n);
        high = max(high, max(v, zero() - v));
        odd = odd + (v - v);
    });
    return largest(high) / 127.0f + sum(odd);
}

// Whole numbers of a scale are a row times this; a row too small for it to be finite counts as 0.
inline Vec factor_of(float scale) { return broadcast(scale > 1.2e-38f ? 1.0f / scale : 0.0f); }

// A row of x as units; with a scale as whole numbers of it. Returns what a weight's 128 too many add to a sum.
template <class A>
inline float prepare_row(const float* x, int64_t k, float scale, float* units) {
    if constexpr (A::in_unit == 4) {
#ifdef FASTGPT_NARROW_DOTS
        const Vec factor = factor_of(scale);
        char* to = reinterpret_cast<char*>(units);
        __m512i total = _mm512_setzero_si512();
        for_each_vec(k, [&](int64_t j, int64_t n) {
            const __m512i q = _mm512_cvtps_epi32((load_part(x + j, n) * factor).v);
            total = _mm512_add_epi32(total, q);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), _mm512_cvtsepi32_epi8(q));
        });
        return 128.0f * static_cast<float>(_mm512_reduce_add_epi32(total));
#endif
    } else if constexpr (A::in_unit == 2) {
        WeightRow<float> row;
        row.at = x;
        int64_t j = 0;
        for (; j + 2 * Vec::width <= k; j += 2 * Vec::width) store(units + j / 2, A::units(row, j));
        if (j < k) store(units + j / 2, A::units(row, j, k - j));
    } else {
        const Vec factor = factor_of(scale);
        for_each_vec(k, [&](int64_t j, int64_t n) { store_part(units + j, round(load_part(x + j, n) * factor), n); });
    }
    return 0.0f;
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
