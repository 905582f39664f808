// The table of kernels, one for each instruction set that kernels.cpp was compiled for.
#pragma once

#include <cstdint>

namespace fastgpt {

struct AttentionShape {
    int64_t batch, heads, queries, keys, head_dim;
    // Elements between neighbours along batch, head and token; along head_dim neighbours are adjacent.
    int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token;
};

// An nn.Linear as it stands: element (o, i) of the weight at weight[o * row + i * col], one of the strides 1.
struct Linear {
    const float* weight;
    int64_t row, col;
    const float* bias;  // or null
    int64_t out, in;
};

// A transformer block as it stands. The caches are [batch, heads, capacity, head_dim] or null.
struct Block {
    const float *scale1, *shift1;
    Linear query, key, value, out_proj;
    const float *scale2, *shift2;
    Linear up, down;
    float *key_cache, *value_cache;
};

// One forward pass through embeddings (where ids is set), blocks, final norm and head (where out is set).
struct Forward {
    int64_t batch, tokens, past, capacity, width, heads, head_dim, hidden;
    const void* ids;                 // [batch, tokens] or null; then x holds the embeddings
    int64_t wide_ids;                // whether they are int64 rather than int32
    const float *tok_emb, *pos_emb;  // [vocab, width], [context, width]
    float* x;                        // [batch * tokens, width]: the residual stream
    const float *final_scale, *final_shift;
    Linear head;  // weight null: out receives the norm itself
    float* out;   // [batch * tokens, head.out] or, of the last tokens only, [batch, head.out]; or null
    int64_t last_only;
    float* workspace;  // forward_workspace floats
    int64_t n_blocks;
};

struct Kernels {
    const char* isa;
    void (*layer_norm)(const float* x, const float* branch, const float* weight, const float* bias, float* total,
                       float* y, float* mean, float* rstd, int64_t rows, int64_t cols, float eps, int threads);
    void (*bias_gelu)(const float* x, const float* bias, float* y, int64_t rows, int64_t cols, int threads);
    // False where the workspace could not be had; nothing is written then.
    bool (*causal_attention)(const float* q, const float* k, const float* v, float* out, float* lse, float scale,
                             const AttentionShape& shape, int threads);
    int64_t (*forward_workspace)(const Forward& f, int threads);
    void (*forward)(const Forward& f, const Block* blocks, float eps, int threads);
};

}  // namespace fastgpt
