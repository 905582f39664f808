// A linear layer, forward and backward: y = x W^T + bias and its gradients are products of gemm.h, the gradients with
// their operands read the other way round.
#pragma once

#include "column_sums.h"
#include "gemm.h"
#include "kernels.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// y = x W^T + bias; x: [rows, in], y: [rows, out], their rows x_row and y_row apart.
inline Product forward_product(const Linear& w, const float* x, int64_t x_row, int64_t rows, void* y, int64_t y_row) {
    Product p{{x, x_row, 1}, w.weight, y, y_row, rows, w.out, w.in};
    p.bias = w.bias;
    return p;
}

// dx = dy W.
inline Product input_gradient(const Linear& w, const float* dy, int64_t dy_row, int64_t rows, float* dx,
                              int64_t dx_row) {
    const Weight turned{w.weight.at, w.weight.col, w.weight.row, w.weight.format};
    return {{dy, dy_row, 1}, turned, dx, dx_row, rows, w.in, w.out};
}

// dW[out, in] = dy^T x over the rows, in the layout that the gradient has.
inline Product weight_gradient(const LinearGradient& to, const float* dy, int64_t dy_row, int64_t out, const float* x,
                               int64_t x_row, int64_t in, int64_t rows) {
    if (to.col == 1) return {{dy, 1, dy_row}, Weight{x, 1, x_row}, to.weight, to.row, out, in, rows};
    return {{x, 1, x_row}, Weight{dy, 1, dy_row}, to.weight, to.col, in, out, rows};
}

// y += the product rather than y =.
inline void add_to_result(Product& p) { p.residual = static_cast<float*>(p.y), p.residual_row = p.y_row; }

inline void share(Team& team, const Product& p) {
    const Parts parts = parts_of(p, team.parts);
    team.share(parts.m * parts.n, [&](int64_t i, bool again) { run_product(p, parts, i, team.scratch, again); });
}

// dW and the bias's gradient as the sum of dy's rows, each where it is wanted; dW added to what is there if `add`.
inline void share_parameter_gradients(Team& team, const LinearGradient& to, const float* dy, int64_t dy_row,
                                      int64_t out, const float* x, int64_t x_row, int64_t in, int64_t rows,
                                      bool narrow_sums, bool add = false) {
    if (to.weight) {
        Product p = weight_gradient(to, dy, dy_row, out, x, x_row, in, rows);
        p.narrow_sums = narrow_sums;
        if (add) add_to_result(p);
        share(team, p);
    }
    if (to.bias) column_sums(team, dy, dy_row, rows, out, to.bias);
}

inline void linear(const Linear& w, const float* x, float* y, int64_t rows, float* workspace, int threads) {
    in_team(threads, aligned(workspace), product_scratch(w.weight.format != kFloat32),
            [&](Team& team) { share(team, forward_product(w, x, w.in, rows, y, w.out)); });
}

// dy: [rows, out], x: [rows, in], both contiguous; dx or null.
inline void linear_backward(const Linear& w, const float* dy, const float* x, float* dx, const LinearGradient& to,
                            int64_t rows, float* workspace, int threads) {
    in_team(threads, aligned(workspace), product_scratch(true), [&](Team& team) {
        if (dx) share(team, input_gradient(w, dy, w.out, rows, dx, w.in));
        share_parameter_gradients(team, to, dy, w.out, w.out, x, w.in, w.in, rows, false);
    });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
