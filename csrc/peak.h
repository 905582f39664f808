// What a bound is made of: nothing but fused multiply-adds in registers, and nothing but reads of memory.
//
// Threads take small pieces from a counter and note when each was done. fastgpt/bench/bound.py looks for the moment in
// which a thread did the most, so it doesn't matter that other programs take its core away now and then.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// f(piece) for each of [0, pieces) on whichever thread is free.
template <class F>
inline void timed_pieces(PieceEnd* ends, int64_t pieces, double (*clock)(), int threads, F f) {
    std::atomic<int64_t> next{0};
    parallel_region(threads, [&](int64_t part, int64_t) {
        for (int64_t p; (p = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
            f(p);
            ends[p] = {clock(), static_cast<double>(part)};
        }
    });
}

// Returns the floating-point operations of a piece: a multiply-add is two.
inline int64_t multiply_adds_float32(PieceEnd* ends, int64_t pieces, double (*clock)(), int threads) {
    constexpr int chains = 14;  // two pipes of four cycles need 8; with the two factors they fill 16 registers
    constexpr int64_t steps = 4096;
    timed_pieces(ends, pieces, clock, threads, [](int64_t) {
        const Vec factor = broadcast(0.5f), term = broadcast(1.0f);
        Vec x[chains];
        FASTGPT_UNROLL
        for (int i = 0; i < chains; i++) x[i] = broadcast(static_cast<float>(i));
        for (int64_t s = 0; s < steps; s++) {
            FASTGPT_UNROLL
            for (int i = 0; i < chains; i++) x[i] = fma(x[i], factor, term);  // of x, or the product is made once
        }
        Vec total = x[0];
        FASTGPT_UNROLL
        for (int i = 1; i < chains; i++) total = total + x[i];
        volatile float used = sum(total);
        static_cast<void>(used);
    });
    return steps * chains * Vec::width * 2;
}

// Reads a block of floats, `piece` at a time and from its beginning once it was all read, in rows that stream side by
// side as a product's do: one stream alone is slower. `piece` is a multiple of 64.
inline void read_float32(const float* block, int64_t size, int64_t piece, PieceEnd* ends, int64_t pieces,
                         double (*clock)(), int threads) {
    constexpr int rows = 4, line = 16;
    timed_pieces(ends, pieces, clock, threads, [=](int64_t number) {
        const float* const from = block + number % (size / piece) * piece;
        Vec total[rows] = {zero(), zero(), zero(), zero()};
        for (int64_t i = 0; i < piece / rows; i += line) {
            FASTGPT_UNROLL
            for (int r = 0; r < rows; r++) {
                FASTGPT_UNROLL
                for (int v = 0; v < line; v += Vec::width)
                    total[r] = total[r] + load(from + r * (piece / rows) + i + v);
            }
        }
        volatile float used = sum((total[0] + total[1]) + (total[2] + total[3]));
        static_cast<void>(used);
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
