// Compiled once per instruction set, with FASTGPT_ISA naming it and the matching compiler flags (setup.py).
#include "kernels.h"

#include "causal_attention.h"
#include "forward.h"
#include "gelu.h"
#include "layer_norm.h"

#define FASTGPT_STRING_(x) #x
#define FASTGPT_STRING(x) FASTGPT_STRING_(x)

namespace fastgpt {
namespace FASTGPT_ISA {

extern const Kernels kernels;
const Kernels kernels = {FASTGPT_STRING(FASTGPT_ISA), layer_norm, bias_gelu, causal_attention,
                         forward_workspace,           forward};

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
