// The table of kernels, one for each instruction set that kernels.cpp was compiled for.
#pragma once

#include <cstdint>

namespace fastgpt {

// Lets another thread have the core; in bindings.cpp, because no system header may be included with the kernels:
// windows.h has macros for `min`, `max` and `small`.
void yield_processor();
double seconds_now();

// What the threads of this thread's calls have waited for each other so far, in seconds, beyond a short while each.
double& seconds_waited();

// f(of, part, parts) on the calling thread and on up to parts - 1 others; in threads.cpp, as is whether they are
// OpenMP's.
bool has_openmp();
typedef void (*PartOfRegion)(void* of, int64_t part, int64_t parts);
void run_parts(int64_t parts, PartOfRegion f, void* of);

struct AttentionShape {
    int64_t batch, heads, queries, keys, head_dim;
    // Elements between neighbours along batch, head and token; along head_dim neighbours are adjacent.
    int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token;
};

// How numbers lie in memory (fastgpt/cpu/records.py counts them alike). The last three are quantised weights of
// fastgpt/quantized_weight.py, int8-dynamic one whose product takes int8 activations too.
enum Format : int64_t { kFloat32, kBFloat16, kFloat16, kInt8, kInt8Dynamic, kInt4 };

// A row of numbers in one of the first three formats, or null.
struct Numbers {
    const void* at;
    int64_t format;
};

// A matrix of parameters as it stands: element (o, i) behind o * row + i * col others, one of the strides 1. A
// quantised one is row-major and whole; its scale is float32, one a row, or bfloat16, one a group of a row, as is the
// minimum.
struct Weight {
    const void* at;
    int64_t row, col, format = kFloat32;
    const void *scale = nullptr, *minimum = nullptr;
    int64_t group = 0;
    int64_t alike = 0;  // whether products sum up many rows as they do a single one (fastgpt.batch_invariant)
};

// An nn.Linear as it stands.
struct Linear {
    Weight weight;
    Numbers bias;
    int64_t out, in;
};

// A transformer block as it stands. The caches are [batch, heads, capacity, head_dim] or null.
struct Block {
    Numbers scale1, shift1;
    Linear query, key, value, out_proj;
    Numbers scale2, shift2;
    Linear up, down;
    void *key_cache, *value_cache;
};

// One of several texts that stand one behind another: its first row, and how many tokens, behind how many cached ones.
// Its cache is [layers, 2, heads, capacity, head_dim], keys and then values, or null.
struct Sequence {
    int64_t first, tokens, past, capacity;
    void* cache;
};

// One forward pass through embeddings (where ids is set), blocks, final norm and head (where out is set).
struct Forward {
    int64_t batch, tokens, past, capacity, width, heads, head_dim, hidden;
    const void* ids;   // [batch, tokens] or null; then x holds the embeddings
    int64_t wide_ids;  // whether they are int64 rather than int32
    Weight tok_emb;    // [vocab, width]
    Numbers pos_emb;   // [context, width]
    float* x;          // [batch * tokens, width]: the residual stream
    Numbers final_scale, final_shift;
    Linear head;  // weight null: out receives the norm itself
    void* out;    // [batch * tokens, head.out] or, of each sequence's last token only, [sequences, head.out]; or null
    int64_t result_format, cache_format;  // of the first three
    int64_t narrow_sums;  // whether products of many rows may take factors in bfloat16 though a weight is wider
    int64_t last_only;
    float* workspace;  // forward_workspace floats
    int64_t n_blocks;
    // Null: batch sequences of as many tokens each. Else batch is 1, past and the blocks' own caches do not count.
    const Sequence* sequences;
    int64_t n_sequences;
};

// Where the gradients of an nn.Linear go; null what nobody asked for. Element (o, i) of the weight's at
// weight[o * row + i * col], one of the strides 1.
struct LinearGradient {
    float* weight;
    int64_t row, col;
    float* bias;

    bool any() const { return weight || bias; }
};

struct BlockGradients {
    float *scale1, *shift1;  // both or neither
    LinearGradient query, key, value, out_proj;
    float *scale2, *shift2;
    LinearGradient up, down;
};

// A block in a training step: rows are batch * tokens.
struct BlockStep {
    int64_t batch, tokens, width, heads, head_dim, hidden;
    const float* x;  // [rows, width]
    float* y;        // [rows, width]; null in backward
    float* kept;     // from forward to backward: block_kept floats
    int64_t attention_seed, shortcut1_seed, shortcut2_seed;
    double attention_p, shortcut_p;  // of the dropouts
    int64_t narrow_sums;             // whether products of many rows may take factors in bfloat16
    float* workspace;                // block_step_workspace floats
};

// The embeddings of token ids: y = dropout(tok_emb[id] + pos_emb[past + t]).
struct Embedding {
    int64_t batch, tokens, past, width;
    const void* ids;                 // [batch, tokens]
    int64_t wide_ids;                // whether they are int64 rather than int32
    const float *tok_emb, *pos_emb;  // [vocab, width], [context, width]; null in backward
    int64_t seed;
    double dropout_p;
};

struct NormBackward {
    const float *dy, *x;
    Numbers scale;
    const float *mean, *rstd;
    const float* dtotal;     // [rows, cols] or null: joins dx
    float* dx;               // or null
    float *dscale, *dshift;  // or both null
    float* partials;         // norm_partials floats, where dscale is set
    int64_t rows, cols;
};

// When a piece of a measured peak was done, and by which thread of the region.
struct PieceEnd {
    double seconds, thread;
};

// Every kernel: its result, name and parameters. Attention, forward and backward, returns false where its workspace
// cannot be allocated, and writes nothing then; few_rows is how many rows a product takes before it sums up in another
// order; takes_blas is whether there is a BLAS that sums up rows alike; deepest_alike is the most inputs of a row-major
// weight that `alike` holds for; product_scratch counts the floats of one thread.
#define FASTGPT_KERNELS(KERNEL)                                                                                        \
    KERNEL(void, layer_norm,                                                                                           \
           (const float* x, const float* branch, const float* weight, const float* bias, float* total, float* y,       \
            float* mean, float* rstd, int64_t rows, int64_t cols, float eps, int64_t seed, double dropout_p,           \
            int threads))                                                                                              \
    KERNEL(int64_t, norm_partials, (int64_t rows, int64_t cols))                                                       \
    KERNEL(void, layer_norm_backward,                                                                                  \
           (const NormBackward& b, float* dbranch, int64_t seed, double dropout_p, int threads))                       \
    KERNEL(void, bias_gelu, (const float* x, const float* bias, float* y, int64_t rows, int64_t cols, int threads))    \
    KERNEL(void, bias_gelu_backward,                                                                                   \
           (const float* dy, const float* x, const float* bias, float* dx, float* dbias, int64_t rows, int64_t cols,   \
            int threads))                                                                                              \
    KERNEL(bool, causal_attention,                                                                                     \
           (const float* q, const float* k, const float* v, float* out, float* softmax, float scale,                   \
            const AttentionShape& shape, int64_t seed, double dropout_p, int threads))                                 \
    KERNEL(bool, causal_attention_backward,                                                                            \
           (const float* q, const float* k, const float* v, const float* out, const float* dout, const float* softmax, \
            float* dq, float* dk, float* dv, float scale, const AttentionShape& shape,                                 \
            const AttentionShape& gradients, int64_t seed, double dropout_p, int threads))                             \
    KERNEL(void, dropout, (float* x, int64_t rows, int64_t cols, int64_t seed, double p, int threads))                 \
    KERNEL(void, embedding, (const Embedding& e, float* y, int threads))                                               \
    KERNEL(                                                                                                            \
        void, embedding_backward,                                                                                      \
        (const Embedding& e, const float* dy, float* dtok, int64_t vocab, float* dpos, int64_t context, int threads))  \
    KERNEL(bool, takes_blas, ())                                                                                       \
    KERNEL(int64_t, few_rows, (bool column_major))                                                                     \
    KERNEL(int64_t, deepest_alike, ())                                                                                 \
    KERNEL(int64_t, product_scratch, (bool backward))                                                                  \
    KERNEL(void, linear, (const Linear& w, const float* x, float* y, int64_t rows, float* workspace, int threads))     \
    KERNEL(void, linear_backward,                                                                                      \
           (const Linear& w, const float* dy, const float* x, float* dx, const LinearGradient& to, int64_t rows,       \
            float* workspace, int threads))                                                                            \
    KERNEL(int64_t, linear_cross_entropy_workspace, (int64_t rows, int64_t vocab, int threads))                        \
    KERNEL(void, linear_cross_entropy,                                                                                 \
           (const Linear& w, const float* x, const int64_t* targets, int64_t ignore, float* loss,                      \
            const float* upstream, float* dx, const LinearGradient& to, int64_t rows, float* workspace, int threads))  \
    KERNEL(int64_t, block_kept, (const BlockStep& s))                                                                  \
    KERNEL(int64_t, block_step_workspace, (const BlockStep& s, bool backward, int threads))                            \
    KERNEL(void, block_step, (const BlockStep& s, const Block& b, float eps, int threads))                             \
    KERNEL(void, block_step_backward,                                                                                  \
           (const BlockStep& s, const Block& b, const float* dy, float* dx, const BlockGradients& to, int threads))    \
    KERNEL(int64_t, forward_workspace, (const Forward& f, int threads))                                                \
    KERNEL(void, forward, (const Forward& f, const Block* blocks, float eps, int threads))                             \
    KERNEL(int64_t, multiply_adds_float32, (PieceEnd * ends, int64_t pieces, double (*clock)(), int threads))          \
    KERNEL(void, read_float32,                                                                                         \
           (const float* block, int64_t size, int64_t piece, PieceEnd* ends, int64_t pieces, double (*clock)(),        \
            int threads))

struct Kernels {
    const char* isa;
#define FASTGPT_FIELD(result, name, parameters) result(*name) parameters;
    FASTGPT_KERNELS(FASTGPT_FIELD)
#undef FASTGPT_FIELD
};

}  // namespace fastgpt
