// Compiled once per instruction set, with FASTGPT_ISA naming it and the matching compiler flags (setup.py).
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 finds its own AVX-512 header at fault
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
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
#define FASTGPT_ENTRY(result, name, parameters) name,
const Kernels kernels = {FASTGPT_STRING(FASTGPT_ISA), FASTGPT_KERNELS(FASTGPT_ENTRY)};

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
