"""A step of cached generation of at most 16 rows in five launches a layer: LayerNorm with queries,
keys and values, which go straight into the caches; attention over splits of these; their join with
the output projection and the residual; LayerNorm with the hidden layer and GELU; the layer behind
it with the residual.

With FASTGPT_DECODE_LAYER=1 a layer's five are one, on NVIDIA's GPUs.

The residual stream is float32. No product is the vendor's, whose workspace a CUDA graph would hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import repeat

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.model.token_pass import Parts
from fastgpt.triton import launch_table, vendor


def takes(parts: Parts, rows: int) -> bool:
    """Whether the kernels read these parameters, for so many rows: none is quantised."""
    tensors = parts.parameters()
    return (
        rows <= vendor.FEW_ROWS
        and all(isinstance(t, Tensor) for t in tensors)
        and all(t.is_contiguous() for t in tensors if t.dim() == 1)
        and all(dispatch.on_triton(op, parts.pos) for op in ("decode_step", "linear_rows"))
    )


def _takes_whole_layers(pos: Tensor) -> bool:
    """Whether a layer is one launch: on NVIDIA's GPUs, where somebody asked for it."""
    return (
        os.environ.get("FASTGPT_DECODE_LAYER") == "1"
        and dispatch.on_triton("decode_layer", pos)
        and launch_table.device_of(pos).arch.startswith("sm_")
    )


def logits_of(
    parts: Parts, ids: Tensor, position: Tensor, caches: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Logits [N, vocab_size] of the tokens ids [N], whose keys and values join the caches.

    position: [N] int32; moves on as ``decode_graph.step`` says.
    """
    pos, eps = parts.pos, parts.eps
    step, attention, product, layer = (
        dispatch.module("triton", op, pos)
        for op in ("decode_step", "decode_attention", "linear_rows", "decode_layer")
    )
    n, width = len(ids), pos.shape[1]
    head_dim = width // parts.n_heads
    x = pos.new_empty((n, width), dtype=torch.float32)
    place, length = torch.empty_like(position), torch.empty_like(position)
    counters = None
    of_layers: Iterable[Tensor | None] = repeat(None, len(parts.blocks))
    if _takes_whole_layers(pos):
        counters = torch.empty(len(parts.blocks), dtype=torch.int32, device=pos.device)
        of_layers = counters.split(1)
    step.begin_step(ids, position, parts.tok, pos, x, place, length, counters)
    for p, (keys, values), counter in zip(parts.blocks, caches, of_layers, strict=True):
        q = pos.new_empty((n, parts.n_heads, 1, head_dim))
        hidden = pos.new_empty((n, p.up.weight.shape[0]))
        if counter is not None:
            norms, linears = (p.norm1, p.norm2), (p.query, p.key, p.value, p.out, p.up, p.down)
            between = (q, *attention.empty_splits(q, keys), hidden)
            where = place, length, keys, values
            layer.decode_layer(x, norms, linears, eps, *where, between, counter)
            continue
        weights, biases = zip(p.query, p.key, p.value, strict=True)
        step.query_key_value(x, (*p.norm1, eps), weights, biases, place, q, keys, values)
        attended, lse = attention.decode_attention_in_splits(
            q, keys, values, length, head_dim**-0.5
        )
        product.linear_rows(attended, *p.out, x, lse=lse, residual=x)
        product.linear_rows(x, *p.up, hidden, gelu=True, norm=(*p.norm2, eps))
        product.linear_rows(hidden, *p.down, x, residual=x)
    logits = pos.new_empty((n, parts.head.weight.shape[0]))
    product.linear_rows(x, *parts.head, logits, norm=(*parts.norm, eps))
    return logits
