// Compiled once per instruction set, with FASTGPT_ISA naming it and the matching compiler flags (setup.py).
#include "kernels.h"

#include "causal_attention_backward.h"
#include "embedding.h"
#include "forward.h"
#include "gelu.h"
#include "layer_norm.h"
#include "linear_cross_entropy.h"
#include "peak.h"
#include "transformer_block_backward.h"

#define FASTGPT_STRING_(x) #x
#define FASTGPT_STRING(x) FASTGPT_STRING_(x)

namespace fastgpt {
namespace FASTGPT_ISA {

extern const Kernels kernels;
const Kernels kernels = {FASTGPT_STRING(FASTGPT_ISA),
                         layer_norm,
                         norm_partials,
                         layer_norm_backward,
                         bias_gelu,
                         bias_gelu_backward,
                         causal_attention,
                         causal_attention_backward,
                         embedding,
                         embedding_backward,
                         linear_scratch,
                         linear,
                         linear_backward,
                         linear_cross_entropy_workspace,
                         linear_cross_entropy,
                         block_kept,
                         block_step_workspace,
                         block_step,
                         block_step_backward,
                         forward_workspace,
                         forward,
                         multiply_adds_float32,
                         read_float32};

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
