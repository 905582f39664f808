"""A transformer block of a training step on the CPU: one call forward, one backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.cpu import _C
from fastgpt.cpu.records import (
    Block,
    Linear,
    Norm,
    block_fields,
    data,
    double,
    gradient_like,
    linear_gradient,
    threads_for,
)
from fastgpt.cpu.workspace import workspace


class Dropouts(NamedTuple):
    """Of one call: the probabilities on the attention's weights and on the two shortcuts, and the
    seeds of the three.
    """

    attention_p: float
    shortcut_p: float
    seeds: tuple[int, ...]


def _step(
    x: Tensor,
    p: Block,
    n_heads: int,
    y: Tensor | None,
    kept: Tensor | None,
    drops: Dropouts,
    narrow: bool,
) -> list[int]:
    """struct BlockStep but for its workspace."""
    B, T, D = x.shape
    sizes = (B, T, D, n_heads, D // n_heads, p.up.weight.shape[0])
    probabilities = (double(drops.attention_p), double(drops.shortcut_p))
    addresses = (x.data_ptr(), data(y), data(kept))
    return [*sizes, *addresses, *drops.seeds, *probabilities, int(narrow)]


def _threads(x: Tensor, p: Block) -> int:
    D = x.shape[2]
    return threads_for(x.numel() * (4 * D + 2 * p.up.weight.shape[0]))


def transformer_block(
    x: Tensor,
    p: Block,
    n_heads: int,
    y: Tensor,
    drops: Dropouts,
    eps: float,
    narrow: bool = False,
    owner: object | None = None,
    fields: tuple[int, ...] | None = None,
) -> Tensor:
    """Writes y, the block's output, and returns what its backward needs (csrc/kernels.h).

    x, y: [B, T, D] contiguous, of at least one element and of the parameters' dtype, in which sums
    are float32 whatever it is. ``block_fields`` takes the parameters, and fields is what it made of
    them in this very call, or None. narrow: whether products may take bfloat16 factors.
    """
    fields = fields or block_fields(p, x.dtype, x.shape[2])
    assert fields is not None
    wide = x.float()
    out = y if y.dtype is torch.float32 else torch.empty_like(y, dtype=torch.float32)
    kept = wide.new_empty(_C.block_kept([*_step(wide, p, n_heads, None, None, drops, narrow), 0]))
    step, threads = _step(wide, p, n_heads, out, kept, drops, narrow), _threads(x, p)
    with workspace(owner, _C.block_step_workspace([*step, 0], False, threads)) as scratch:
        _C.block_step([*step, scratch], [*fields, 0, 0], eps, threads)
    if out is not y:
        y.copy_(out)
    return kept


def transformer_block_backward(
    dy: Tensor,
    x: Tensor,
    p: Block,
    n_heads: int,
    kept: Tensor,
    drops: Dropouts,
    want_x: bool,
    wanted: Block,
    narrow: bool = False,
    owner: object | None = None,
) -> tuple[Tensor | None, Block]:
    """The gradients of x and of the parameters, None if they are not wanted.

    dy: [B, T, D] contiguous; wanted: true for each parameter whose gradient is.
    """
    dtype, fields = x.dtype, block_fields(p, x.dtype, x.shape[2])
    assert fields is not None
    x, dy = x.float(), dy.float()
    step, threads = _step(x, p, n_heads, None, kept, drops, narrow), _threads(x, p)
    dx = torch.empty_like(x) if want_x else None
    to = Block(*map(_gradients, p, wanted))  # type: ignore[arg-type]
    gradients: list[int] = []
    for piece in to:
        if isinstance(piece, Norm):
            gradients += (data(piece.scale), data(piece.shift))
        else:
            gradients += linear_gradient(*piece)
    with workspace(owner, _C.block_step_workspace([*step, 0], True, threads)) as scratch:
        _C.block_step_backward(
            [*step, scratch], [*fields, 0, 0], dy.data_ptr(), data(dx), gradients, threads
        )
    return None if dx is None else dx.to(dtype), Block.of(
        g.to(dtype) if want else None for g, want in zip(to.flat(), wanted.flat(), strict=True)
    )


def _gradients(piece: Norm | Linear, wanted: Norm | Linear) -> Norm | Linear:
    """Empty ones of a piece's parameters, in float32; a norm's two come together."""
    if isinstance(piece, Norm):
        return Norm(*map(_empty, piece)) if any(wanted) else Norm(None, None)
    weight = gradient_like(piece.weight, torch.float32) if wanted[0] else None
    bias = _empty(piece.bias) if wanted[1] and piece.bias is not None else None
    return Linear(weight, bias)


def _empty(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, dtype=torch.float32)
