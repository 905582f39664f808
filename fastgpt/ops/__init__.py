"""The fused operations: one file each, with the documented function, its gradient and the choice of
backend.
"""

from fastgpt.ops.causal_attention import causal_attention
from fastgpt.ops.dropout import dropout
from fastgpt.ops.embedding import embedding
from fastgpt.ops.gelu import bias_gelu, gelu
from fastgpt.ops.layer_norm import add_layer_norm, layer_norm
from fastgpt.ops.linear import linear, linear_gelu
from fastgpt.ops.linear_cross_entropy import (
    check_targets,
    checked_linear_cross_entropy,
    linear_cross_entropy,
)
from fastgpt.ops.packed_linear import packed_linear
from fastgpt.ops.quantized_linear import quantized_linear
from fastgpt.ops.transformer_block import transformer_block

__all__ = [
    "add_layer_norm",
    "bias_gelu",
    "causal_attention",
    "check_targets",
    "checked_linear_cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_gelu",
    "packed_linear",
    "quantized_linear",
    "transformer_block",
]
