// The sums over rows that a bias's gradient is made of.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// total += added; what that rounds off joins `lost` (Knuth's two-sum), so that both together are as good as rounded
// once, in whatever order PyTorch adds.
inline void add_with_rest(Vec& total, Vec& lost, Vec added) {
    const Vec sum = total + added, back = sum - total;
    lost = lost + ((total - (sum - back)) + (added - back));
    total = sum;
}

inline Vec with_rest(Vec total, Vec lost) {
    // Infinity less itself is not a number; both functions return their second operand then.
    return total + (max(lost, zero()) + min(lost, zero()));
}

// out[c] = the sum of x[r * x_row + c] over the rows; nothing is shared.
inline void column_sums(Team& team, const float* x, int64_t x_row, int64_t rows, int64_t cols, float* out) {
    const auto sums = [&](int64_t c) {
        const int64_t n = min(Vec::width, cols - c);
        Vec total = zero(), lost = zero();
        for (int64_t r = 0; r < rows; ++r) add_with_rest(total, lost, load_part(x + r * x_row + c, n));
        store_part(out + c, with_rest(total, lost), n);
    };
    team.share_range(up(cols, Vec::width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sums(i * Vec::width);
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
