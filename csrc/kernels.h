// The table of kernels, one for each instruction set that kernels.cpp was compiled for.
#pragma once

#include <cstdint>

namespace fastgpt {

struct AttentionShape {
    int64_t batch, heads, queries, keys, head_dim;
    // Elements between neighbours along batch, head and token; along head_dim neighbours are adjacent.
    int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token;
};

struct Kernels {
    const char* isa;
    void (*layer_norm)(const float* x, const float* branch, const float* weight, const float* bias, float* total,
                       float* y, float* mean, float* rstd, int64_t rows, int64_t cols, float eps, int threads);
    void (*bias_gelu)(const float* x, const float* bias, float* y, int64_t rows, int64_t cols, int threads);
    // False where the workspace could not be had; nothing is written then.
    bool (*causal_attention)(const float* q, const float* k, const float* v, float* out, float* lse, float scale,
                             const AttentionShape& shape, int threads);
};

}  // namespace fastgpt
