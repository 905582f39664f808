// The gradients of y = x W^T + bias, each a product of linear.h with its operands read the other way round.
#pragma once

#include "kernels.h"
#include "layer_norm.h"
#include "linear.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// dx = dy W, or dx += dy W; with pre, dx = (dy W) gelu'(pre) and act = gelu(pre), all [rows, in] and dx_row apart.
inline void share_input_gradient(const Team& team, const Linear& w, const float* dy, int64_t dy_row, int64_t rows,
                                 float* dx, int64_t dx_row, bool add = false, float* pre = nullptr,
                                 float* act = nullptr) {
    const LinearCall call{dy,
                          dy_row,
                          1,
                          w.weight,
                          w.col,
                          w.row,
                          nullptr,
                          add ? dx : nullptr,
                          dx_row,
                          dx,
                          dx_row,
                          rows,
                          w.in,
                          w.out,
                          pre ? kGeluBackward : kPlain,
                          pre,
                          act};
    product(call, team.part, team.parts, team.scratch);
}

// dW = dy^T x, or dW += dy^T x, in the layout that the gradient has, and the bias's as the sum of dy's rows.
inline void share_parameter_gradients(const Team& team, const LinearGradient& to, const float* dy, int64_t dy_row,
                                      int64_t out, const float* x, int64_t x_row, int64_t in, int64_t rows,
                                      bool add = false) {
    if (to.weight && to.col == 1) {
        const LinearCall call{dy,     1,         dy_row, x,   1,  x_row, nullptr, add ? to.weight : nullptr,
                              to.row, to.weight, to.row, out, in, rows,  kPlain,  nullptr,
                              nullptr};
        product(call, team.part, team.parts, team.scratch);
    } else if (to.weight) {
        const LinearCall call{x,      1,         x_row,  dy, 1,   dy_row, nullptr, add ? to.weight : nullptr,
                              to.col, to.weight, to.col, in, out, rows,   kPlain,  nullptr,
                              nullptr};
        product(call, team.part, team.parts, team.scratch);
    }
    if (to.bias) column_sums(team, dy, dy_row, rows, out, to.bias);
}

inline void linear(const Linear& w, const float* x, float* y, int64_t rows, float* workspace, int threads) {
    parallel_region(threads, [&](int64_t part, int64_t parts) {
        const LinearCall call{x, w.in,  1,    w.weight, w.row, w.col,  w.bias,  nullptr, 0,
                              y, w.out, rows, w.out,    w.in,  kPlain, nullptr, nullptr};
        product(call, part, parts, aligned(workspace) + part * linear_scratch(false));
    });
}

// dy: [rows, out], x: [rows, in], both contiguous; dx or null.
inline void linear_backward(const Linear& w, const float* dy, const float* x, float* dx, const LinearGradient& to,
                            int64_t rows, float* workspace, int threads) {
    Barrier meeting;
    parallel_region(threads, [&](int64_t part, int64_t parts) {
        const Team team{part, parts, meeting, aligned(workspace) + part * linear_scratch(true)};
        if (dx) share_input_gradient(team, w, dy, w.out, rows, dx, w.in);
        share_parameter_gradients(team, to, dy, w.out, w.out, x, w.in, w.in, rows);
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
