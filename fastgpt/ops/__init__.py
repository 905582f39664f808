"""The fused operations: one file each, with the documented function, its gradient and the choice of
backend.
"""

from fastgpt.ops.causal_attention import causal_attention
from fastgpt.ops.gelu import bias_gelu, gelu
from fastgpt.ops.layer_norm import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "bias_gelu", "causal_attention", "gelu", "layer_norm"]
