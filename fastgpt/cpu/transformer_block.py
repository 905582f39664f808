"""A transformer block of a training step on the CPU: one call forward, one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.cpu import _C
from fastgpt.cpu.records import (
    address,
    data,
    double,
    gradient_like,
    linear,
    linear_gradient,
    threads_for,
)
from fastgpt.cpu.workspace import workspace

EPS = 1e-5


class BlockParameters(NamedTuple):
    """A block's parameters. Norms: [D]; weights [n_out, n_in]: query, key, value and out [D, D], up
    [F, D], down [D, F]; biases [n_out] or None.
    """

    scale1: Tensor
    shift1: Tensor
    query_weight: Tensor
    query_bias: Tensor | None
    key_weight: Tensor
    key_bias: Tensor | None
    value_weight: Tensor
    value_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    scale2: Tensor
    shift2: Tensor
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None


class Dropouts(NamedTuple):
    """Of one call: the probabilities on the attention's weights and on the two shortcuts, and the
    seeds of the three.
    """

    attention_p: float
    shortcut_p: float
    seeds: tuple[int, ...]


def record(p: BlockParameters, width: int) -> tuple[int, ...] | None:
    """struct Block but for its caches; None where C++ cannot read a parameter."""
    if p.up_weight is None or p.up_weight.dim() != 2:
        return None
    hidden = p.up_weight.shape[0]
    norms = [address(p[i], width) for i in (0, 1, 10, 11)]
    inner = [linear(p[i], p[i + 1], width, width) for i in (2, 4, 6, 8)]
    outer = (linear(p[12], p[13], width, hidden), linear(p[14], p[15], hidden, width))
    if None in norms or None in inner or None in outer:
        return None
    parts = (norms[:2], *inner, norms[2:], *outer)
    return tuple(field for part in parts for field in part)  # type: ignore[union-attr, misc]


def _step(
    x: Tensor,
    p: BlockParameters,
    n_heads: int,
    y: Tensor | None,
    kept: Tensor | None,
    drops: Dropouts,
) -> list[int]:
    """struct BlockStep but for its workspace."""
    B, T, D = x.shape
    sizes = (B, T, D, n_heads, D // n_heads, p.up_weight.shape[0])
    probabilities = (double(drops.attention_p), double(drops.shortcut_p))
    return [*sizes, x.data_ptr(), data(y), data(kept), *drops.seeds, *probabilities]


def _threads(x: Tensor, p: BlockParameters) -> int:
    D = x.shape[2]
    return threads_for(x.numel() * (4 * D + 2 * p.up_weight.shape[0]))


def transformer_block(
    x: Tensor,
    p: BlockParameters,
    n_heads: int,
    y: Tensor,
    drops: Dropouts,
    owner: object | None = None,
    fields: tuple[int, ...] | None = None,
) -> Tensor:
    """Writes y, the block's output, and returns what its backward needs (csrc/kernels.h).

    x, y: [B, T, D] contiguous float32, of at least one element; ``record`` takes the parameters,
    and fields is what it made of them in this very call, or None.
    """
    kept = x.new_empty(_C.block_kept([*_step(x, p, n_heads, None, None, drops), 0]))
    step, threads = _step(x, p, n_heads, y, kept, drops), _threads(x, p)
    fields = fields or record(p, x.shape[2])
    assert fields is not None
    with workspace(owner, _C.block_step_workspace([*step, 0], False, threads)) as scratch:
        _C.block_step([*step, scratch], [*fields, 0, 0], EPS, threads)
    return kept


def transformer_block_backward(
    dy: Tensor,
    x: Tensor,
    p: BlockParameters,
    n_heads: int,
    kept: Tensor,
    drops: Dropouts,
    wanted: Sequence[bool],
    owner: object | None = None,
) -> list[Tensor | None]:
    """The gradients of x and of the parameters, in that order, where they are wanted.

    dy: [B, T, D] contiguous.
    """
    fields = record(p, x.shape[2])
    assert fields is not None
    step, threads = _step(x, p, n_heads, None, kept, drops), _threads(x, p)
    dx = torch.empty_like(x) if wanted[0] else None
    to: list[Tensor | None] = [None] * len(p)
    for i, (parameter, want) in enumerate(zip(p, wanted[1:], strict=True)):
        if want and parameter is not None:
            to[i] = (
                gradient_like(parameter)
                if parameter.dim() == 2
                else parameter.new_empty(parameter.shape)
            )
    for i in (0, 10):  # a norm's two gradients come together
        if (to[i] is None) != (to[i + 1] is None):
            to[i], to[i + 1] = (
                t if t is not None else x.new_empty(x.shape[2]) for t in to[i : i + 2]
            )
    gradients: list[int] = []
    for i in range(0, 16, 2):
        if i in (0, 10):
            gradients += [data(to[i]), data(to[i + 1])]
        else:
            gradients += linear_gradient(to[i], to[i + 1])
    with workspace(owner, _C.block_step_workspace([*step, 0], True, threads)) as scratch:
        _C.block_step_backward(
            [*step, scratch], [*fields, 0, 0], dy.data_ptr(), data(dx), gradients, threads
        )
    return [g if want else None for g, want in zip((dx, *to), wanted, strict=True)]
