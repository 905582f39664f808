// The sums over rows that a bias's gradient is made of.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// out[c] = the sum of x[r * x_row + c] over the rows; nothing is shared. Eight rows, then eight such groups, then all:
// short chains of additions round less.
inline void column_sums(Team& team, const float* x, int64_t x_row, int64_t rows, int64_t cols, float* out) {
    const auto sums = [&](int64_t c) {
        const int64_t n = min(Vec::width, cols - c);
        const auto row = [&](int64_t r) { return load_part(x + r * x_row + c, n); };
        Vec total = zero();
        for (int64_t r0 = 0; r0 < rows; r0 += 64) {
            const int64_t r1 = min(rows, r0 + 64);
            Vec chunk = zero();
            int64_t r = r0;
            for (; r + 8 <= r1; r += 8)
                chunk = chunk + (((row(r) + row(r + 1)) + (row(r + 2) + row(r + 3))) +
                                 ((row(r + 4) + row(r + 5)) + (row(r + 6) + row(r + 7))));
            Vec rest = zero();
            for (; r < r1; ++r) rest = rest + row(r);
            total = total + (chunk + rest);
        }
        store_part(out + c, total, n);
    };
    team.share_range(up(cols, Vec::width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sums(i * Vec::width);
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
