"""A step of cached generation of at most 16 rows in five launches a layer: LayerNorm with queries,
keys and values, which go straight into the caches; attention over splits of these; their join with
the output projection and the residual; LayerNorm with the hidden layer and GELU; the layer behind
it with the residual.

The residual stream is float32. No product is the vendor's, whose workspace a CUDA graph would hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.model.token_pass import Parts
from fastgpt.triton import vendor


def takes(parts: Parts, rows: int) -> bool:
    """Whether the kernels read these parameters, for so many rows: none is quantised."""
    tensors = parts.parameters()
    return (
        rows <= vendor.FEW_ROWS
        and all(isinstance(t, Tensor) for t in tensors)
        and all(t.is_contiguous() for t in tensors if t.dim() == 1)
        and all(dispatch.on_triton(op, parts.pos) for op in ("decode_step", "linear_rows"))
    )


def logits_of(
    parts: Parts, ids: Tensor, position: Tensor, caches: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Logits [N, vocab_size] of the tokens ids [N], whose keys and values join the caches.

    position: [N] int32; moves on as ``decode_graph.step`` says.
    """
    pos, eps = parts.pos, parts.eps
    step, attention, product = (
        dispatch.module("triton", op, pos)
        for op in ("decode_step", "decode_attention", "linear_rows")
    )
    n, width = len(ids), pos.shape[1]
    head_dim = width // parts.n_heads
    x = pos.new_empty((n, width), dtype=torch.float32)
    place, length = torch.empty_like(position), torch.empty_like(position)
    step.begin_step(ids, position, parts.tok, pos, x, place, length)
    for p, (keys, values) in zip(parts.blocks, caches, strict=True):
        q = pos.new_empty((n, parts.n_heads, 1, head_dim))
        weights, biases = zip(p.query, p.key, p.value, strict=True)
        step.query_key_value(x, (*p.norm1, eps), weights, biases, place, q, keys, values)
        attended, lse = attention.decode_attention_in_splits(
            q, keys, values, length, head_dim**-0.5
        )
        product.linear_rows(attended, *p.out, x, lse=lse, residual=x)
        hidden = pos.new_empty((n, p.up.weight.shape[0]))
        product.linear_rows(x, *p.up, hidden, gelu=True, norm=(*p.norm2, eps))
        product.linear_rows(hidden, *p.down, x, residual=x)
    logits = pos.new_empty((n, parts.head.weight.shape[0]))
    product.linear_rows(x, *parts.head, logits, norm=(*parts.norm, eps))
    return logits
