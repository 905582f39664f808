"""Weights in 8 and in 4 bits: what they consist of, how they are made, what they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

PRECISIONS = ("int8", "int8-dynamic", "int4")
GROUPS = (32, 64)
RUN = 32  # elements of a row whose halves share the bytes of an Int4Weight
# The grids tried for each group. Least squares alone leave a squared error 10% larger.
_DRAWN_IN = (0, 0.04, 0.08, 0.12)  # each end, in parts of the group's reach
_MOVES = (0.4, 0.2, 0.1)  # each end, in steps of the grid
_FITS = 2
_CHUNK = 1 << 16  # elements quantised at a time, so that the temporaries stay in the cache


class Int8Weight(NamedTuple):
    """W[o, i] = scale[o] * values[o, i].

    values: int8 [n_out, n_in], -127..127. scale: float32 [n_out], 0 for a row of zeros.
    """

    values: Tensor
    scale: Tensor


class Int4Weight(NamedTuple):
    """W[o, i] = scale[o, g] * q[o, i] + minimum[o, g], with q in 0..15 and g the group of i.

    values: uint8 [n_out, n_in / 2]; of each run of 32 elements of a row, byte j holds element j in
    its low four bits and element j + 16 in its high ones. scale, minimum: bfloat16
    [n_out, n_in / group], for groups of 32 or 64 neighbours along n_in.
    """

    values: Tensor
    scale: Tensor
    minimum: Tensor


QuantizedWeight: TypeAlias = Int8Weight | Int4Weight
_Grid: TypeAlias = tuple[Tensor, Tensor]  # scale and minimum, bfloat16
Device: TypeAlias = torch.device | str | None


def named_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a weight under the names that a layer gives them."""
    values = "weight_int8" if isinstance(weight, Int8Weight) else "weight_int4"
    return dict(zip((values, *weight._fields[1:]), weight, strict=True))


def check_precision(precision: str, group: int) -> None:
    """Raises ValueError if there is no such precision, or no such group."""
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ValueError(f"unknown precision {precision!r}, expected one of {known}")
    if group not in GROUPS:
        raise ValueError(f"a group of {group!r} is not possible, expected 32 or 64")


def empty_weight(
    precision: str, shape: Sequence[int], group: int = 32, device: Device = None
) -> QuantizedWeight:
    """A weight [n_out, n_in] to be filled by ``write_rows``.

    Raises:
        ValueError: there is no such precision, or the group does not divide n_in.
    """
    check_precision(precision, group)
    n_out, n_in = shape
    if precision != "int4":
        values = torch.empty(n_out, n_in, dtype=torch.int8, device=device)
        return Int8Weight(values, torch.empty(n_out, dtype=torch.float32, device=device))
    if n_in % group:
        raise ValueError(f"its width {n_in} is not a multiple of the group of {group}")
    values = torch.empty(n_out, n_in // 2, dtype=torch.uint8, device=device)
    scale = torch.empty(n_out, n_in // group, dtype=torch.bfloat16, device=device)
    return Int4Weight(values, scale, torch.empty_like(scale))


def quantize_weight(weight: Tensor, precision: str, group: int = 32) -> QuantizedWeight:
    """A weight [n_out, n_in] in this precision: ``quantize_int8`` or ``quantize_int4``."""
    if weight.dim() != 2 or not weight.is_floating_point():
        kind = f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        raise ValueError(f"it is {kind}, not a floating-point matrix")
    made = empty_weight(precision, weight.shape, group, weight.device)
    write_rows(made, 0, weight)
    return made


def quantize_int8(weight: Tensor) -> Int8Weight:
    """The nearest values on the grid of each row, whose step is the row's largest magnitude / 127.

    Args:
        weight: [n_out, n_in], any floating dtype.

    Raises:
        ValueError: a value is NaN or infinite, or it is no such weight.
    """
    made = quantize_weight(weight, "int8")
    assert isinstance(made, Int8Weight)
    return made


def quantize_int4(weight: Tensor, group: int = 32) -> Int4Weight:
    """The nearest values on a grid of 16 for each group, fitted to it by least squares.

    Args:
        weight: [n_out, n_in], any floating dtype.
        group: 32 or 64 neighbours along n_in.

    Raises:
        ValueError: a value is NaN or infinite, the group does not divide n_in, or it is no such
            weight.
    """
    made = quantize_weight(weight, "int4", group)
    assert isinstance(made, Int4Weight)
    return made


@torch.no_grad()
def write_rows(weight: QuantizedWeight, first: int, rows: Tensor) -> None:
    """Quantises rows [n, n_in], of any floating dtype, into the weight's rows from `first` on.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if rows.is_meta:
        return
    groups = None if isinstance(weight, Int8Weight) else weight.scale.shape[1]
    for part in rows.split(max(1, _CHUNK // max(1, rows.shape[1]))):
        wide = part.to(weight.values.device, torch.promote_types(part.dtype, torch.float32))
        wide = wide.contiguous()  # sums depend on the layout
        made = _int8(wide) if groups is None else _int4(wide, groups)
        if not all(bool(t.isfinite().all()) for t in made[1:]):
            raise ValueError("it has values that are NaN, infinite or too large")
        for whole, t in zip(weight, made, strict=True):
            whole[first : first + len(part)] = t
        first += len(part)


def _int8(rows: Tensor) -> Int8Weight:
    scale = (rows.abs().amax(1) / 127).float()
    step = scale.where(scale > 0, 1.0).to(rows.dtype)
    values = (rows / step[:, None]).round_().clamp_(-127, 127)
    return Int8Weight(values.to(torch.int8), scale)


def _int4(rows: Tensor, groups: int) -> Int4Weight:
    w = rows.unflatten(1, (groups, -1))  # [n, groups, group]
    scale, minimum = _least_error(w)
    q = _on_grid(w, scale, minimum).to(torch.uint8)
    low_half, high_half = q.reshape(len(rows), -1, 2, RUN // 2).unbind(2)
    values = (low_half | (high_half << 4)).flatten(1)
    return Int4Weight(values, scale.squeeze(-1), minimum.squeeze(-1))


def _least_error(w: Tensor) -> _Grid:
    """The grid of each group, [n, groups, 1], with the least squared error of those tried.

    First grids between the group's least and greatest value, drawn in at either end; then the
    best one with its ends moved by part of a step; then least-squares fits to the best one's q.
    llama.cpp's k-quants (make_qkx2_quants) also search and refit.
    """
    low, high = torch.aminmax(w, dim=-1, keepdim=True)
    grid = _between(low, high)
    error = _error(w, grid)

    def attempt(other: _Grid) -> None:
        nonlocal grid, error
        its_error = _error(w, other)
        better = its_error < error
        error = its_error.where(better, error)
        grid = other[0].where(better, grid[0]), other[1].where(better, grid[1])

    reach = high - low
    for left, right in itertools.product(_DRAWN_IN, repeat=2):
        if left or right:
            attempt(_between(low + left * reach, high - right * reach))
    for part in _MOVES:
        for left, right in ((-part, 0), (part, 0), (0, -part), (0, part)):
            scale, minimum = (t.to(w.dtype) for t in grid)
            attempt(_between(minimum + left * scale, minimum + (15 + right) * scale))
    for _ in range(_FITS):
        attempt(_fitted(w, _on_grid(w, *grid)))
    return grid


def _between(low: Tensor, high: Tensor) -> _Grid:
    """The grid of 16 from low to high, as bfloat16 can hold it."""
    minimum = low.bfloat16()
    return ((high - minimum) / 15).clamp_(min=0).bfloat16(), minimum


def _on_grid(w: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The nearest q of each element, in w's dtype."""
    step = scale.where(scale > 0, 1.0).to(w.dtype)
    return (w - minimum).div_(step).round_().clamp_(0, 15)


def _error(w: Tensor, grid: _Grid) -> Tensor:
    """The root of the squared error of each group, [..., 1]."""
    scale, minimum = (t.to(w.dtype) for t in grid)
    apart = _on_grid(w, *grid).mul_(scale).add_(minimum).sub_(w)
    return torch.linalg.vector_norm(apart, dim=-1, keepdim=True)


def _fitted(w: Tensor, q: Tensor) -> _Grid:
    """The grid of each group with the least squared error for these q."""
    n, of_q, of_w = w.shape[-1], q.sum(-1, keepdim=True), w.sum(-1, keepdim=True)
    spread = n * q.square().sum(-1, keepdim=True) - of_q.square()
    scale = (n * (q * w).sum(-1, keepdim=True) - of_q * of_w) / spread.where(spread > 0, 1.0)
    scale = scale.clamp_(min=0).bfloat16()
    return scale, ((of_w - scale * of_q) / n).bfloat16()


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """What a weight, or rows of one, stands for: [..., n_in], computed in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    scale = weight.scale.to(wide).unsqueeze(-1)
    if isinstance(weight, Int8Weight):
        return (weight.values.to(wide) * scale).to(dtype)
    halves = weight.values.unflatten(-1, (-1, 1, RUN // 2))  # [..., runs, 1, 16]
    q = torch.cat((halves & 15, halves >> 4), dim=-2).flatten(-3)
    groups = q.unflatten(-1, (weight.scale.shape[-1], -1))
    return (groups * scale + weight.minimum.to(wide).unsqueeze(-1)).flatten(-2).to(dtype)
