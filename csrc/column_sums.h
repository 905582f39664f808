// The sums over rows that a bias's gradient is made of.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// out[c] = the sum of x[r * x_row + c] over the rows; nothing is shared. What each addition rounds off is summed beside
// it (Knuth's two-sum), so that the result is as good as rounded once, in whatever order PyTorch adds.
inline void column_sums(Team& team, const float* x, int64_t x_row, int64_t rows, int64_t cols, float* out) {
    const auto sums = [&](int64_t c) {
        const int64_t n = min(Vec::width, cols - c);
        Vec total = zero(), lost = zero();
        for (int64_t r = 0; r < rows; ++r) {
            const Vec added = load_part(x + r * x_row + c, n), sum = total + added, back = sum - total;
            lost = lost + ((total - (sum - back)) + (added - back));
            total = sum;
        }
        // Infinity less itself is not a number; both functions return their second operand then.
        lost = max(lost, zero()) + min(lost, zero());
        store_part(out + c, total + lost, n);
    };
    team.share_range(up(cols, Vec::width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sums(i * Vec::width);
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
