"""The product of at most 16 rows with a weight matrix in Triton, which reads the weight once.

Each program reads all rows, so what makes the rows can be done where they are read, again in every
program, for less than a launch of its own: LayerNorm, or the join of attention's splits. What
follows the product, a bias, GELU, a residual, is in its epilogue.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton import launch_table
from fastgpt.triton.compilation import on_grid
from fastgpt.triton.gelu import gelu as gelu_of

SMALL = 16  # rows


@triton.jit
def finish_part(acc, row, col, bias_ptr, y_ptr, pre_ptr, n_rows, n_cols, GELU: tl.constexpr):
    """Adds the bias, writes the sum to pre and, through GELU, to y, from (row, col) on."""
    rows, cols = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1])
    mask = (row + rows[:, None] < n_rows) & (col + cols[None, :] < n_cols)
    # Only the tile's corner needs 64 bits.
    corner = tl.cast(row, tl.int64) * n_cols + col
    within = rows[:, None] * n_cols + cols[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col + cols, mask=col + cols < n_cols, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + corner + within, acc, mask=mask)
    if GELU:
        acc = gelu_of(acc)
    tl.store(y_ptr + corner + within, acc, mask=mask)


@triton.jit
def row_statistics(x_ptr, n_rows, depth, eps, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Each row's mean and reciprocal deviation, [ROWS].

    A block's mean and squares are of two passes over registers, and blocks are merged as Chan,
    Golub and LeVeque do, so that x is read once and nothing cancels.
    """
    rows, k = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_K)[None, :]
    mean, squares = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, depth, BLOCK_K):
        mask = (rows < n_rows) & (start + k < depth)
        x = tl.load(x_ptr + rows * depth + start + k, mask=mask, other=0.0).to(tl.float32)
        count = tl.minimum(depth - start, BLOCK_K)
        level = tl.sum(x, axis=1) / count
        centred = tl.where(mask, x - level[:, None], 0.0)
        apart, share = level - mean, count / (start + count)
        squares += tl.sum(centred * centred, axis=1) + apart * apart * (start * share)
        mean += apart * share
    return mean, 1.0 / tl.sqrt(squares / depth + eps)


@triton.jit
def _joined(part_ptr, lse_ptr, row, k, mask, splits, depth, head_dim):
    """Elements k of attention's rows, each split weighed by its share of the softmax."""
    part_ptr += row * splits * depth + k
    lse_ptr += (row * (depth // head_dim) + k // head_dim) * splits
    top = tl.load(lse_ptr, mask=mask, other=0.0)
    for split in range(1, splits):
        top = tl.maximum(top, tl.load(lse_ptr + split, mask=mask, other=0.0))
    total, x = tl.zeros_like(top), tl.zeros_like(top)
    for split in range(splits):
        lse = tl.load(lse_ptr + split, mask=mask, other=0.0)
        weight = tl.exp2(lse - top)
        total += weight
        x += weight * tl.load(part_ptr + split * depth, mask=mask, other=0.0)
    return x / total


@triton.jit
def add_rows(
    acc,
    weight,
    x_ptr,
    k,
    n_rows,
    depth,
    PRECISION: tl.constexpr,
    mean=None,
    rstd=None,
    scale_ptr=None,
    shift_ptr=None,
    lse_ptr=None,
    splits=None,
    head_dim=None,
):
    """acc + x weight^T over the elements k of each row of x, for a weight [N, K] in registers.

    x is what x_ptr holds; with a scale, its rows normalised; with lse, attention's splits joined.
    """
    ROWS: tl.constexpr = acc.shape[0]
    rows = tl.arange(0, ROWS)
    if ROWS >= 16:
        x_mask = (rows[:, None] < n_rows) & (k[None, :] < depth)
        if lse_ptr is not None:
            x = _joined(
                x_ptr, lse_ptr, rows[:, None], k[None, :], x_mask, splits, depth, head_dim
            ).to(weight.dtype)
        else:
            offset = rows[:, None] * depth + k[None, :]
            x = tl.load(x_ptr + offset, mask=x_mask, other=0.0)  # [ROWS, K]
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + k, mask=k < depth, other=0.0).to(tl.float32)[None, :]
            shift = tl.load(shift_ptr + k, mask=k < depth, other=0.0).to(tl.float32)[None, :]
            x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * scale + shift
            x = tl.where(x_mask, x, 0.0).to(weight.dtype)
        weight = tl.trans(weight.to(x.dtype))
        if x.dtype == tl.float32:
            # A chain of sums as long as a block, no longer: the compiler turns `acc + dot` into one
            # chain over the whole depth, whose error grows with it.
            acc = tl.fma(tl.dot(x, weight, input_precision=PRECISION), 1.0, acc)
        else:
            acc = tl.dot(x, weight, acc)
    else:
        wide = weight.to(tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + k, mask=k < depth, other=0.0).to(tl.float32)
            shift = tl.load(shift_ptr + k, mask=k < depth, other=0.0).to(tl.float32)
        for row in tl.static_range(ROWS):
            x_mask = k < tl.where(row < n_rows, depth, 0)
            if lse_ptr is not None:
                x = _joined(x_ptr, lse_ptr, row, k, x_mask, splits, depth, head_dim)
            else:
                x = tl.load(x_ptr + row * depth + k, mask=x_mask, other=0.0).to(tl.float32)  # [K]
            if scale_ptr is not None:
                level = tl.sum(tl.where(rows == row, mean, 0.0), axis=0)
                slope = tl.sum(tl.where(rows == row, rstd, 0.0), axis=0)
                x = tl.where(x_mask, (x - level) * slope * scale + shift, 0.0)
            sums = tl.sum(wide * x[None, :], axis=1)  # [N]
            acc += tl.where(rows[:, None] == row, sums[None, :], 0.0)
    return acc


@triton.jit
def row_products(
    x_ptr,
    weight_ptr,
    col,
    n_rows,
    n_cols,
    depth,
    stride_n,
    stride_k,
    mean,
    rstd,
    scale_ptr,
    shift_ptr,
    lse_ptr,
    splits,
    head_dim,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The products of all rows with BLOCK_N of the weight's, [ROWS, BLOCK_N]."""
    cols, k = col + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    weight_ptr += cols[:, None].to(tl.int64) * stride_n + k[None, :].to(tl.int64) * stride_k
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = start + k < depth
        weight_mask = (cols[:, None] < n_cols) & inside[None, :]
        weight = tl.load(weight_ptr, mask=weight_mask, other=0.0)  # [BLOCK_N, BLOCK_K]
        acc = add_rows(
            acc,
            weight,
            x_ptr,
            start + k,
            n_rows,
            depth,
            PRECISION,
            mean,
            rstd,
            scale_ptr,
            shift_ptr,
            lse_ptr,
            splits,
            head_dim,
        )
        weight_ptr += BLOCK_K * stride_k
    return acc


@triton.jit
def linear_rows_tile(
    tile,
    mean,
    rstd,
    x_ptr,
    scale_ptr,
    shift_ptr,
    lse_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    pre_ptr,
    n_rows,
    n_cols,
    depth,
    stride_n,
    stride_k,
    splits,
    head_dim,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N columns of all rows. The arguments are the kernel's, mean and rstd a norm's."""
    col = tile * BLOCK_N
    acc = row_products(
        x_ptr,
        weight_ptr,
        col,
        n_rows,
        n_cols,
        depth,
        stride_n,
        stride_k,
        mean,
        rstd,
        scale_ptr,
        shift_ptr,
        lse_ptr,
        splits,
        head_dim,
        PRECISION,
        ROWS,
        BLOCK_N,
        BLOCK_K,
    )
    if residual_ptr is not None:
        rows, cols = tl.arange(0, ROWS)[:, None], col + tl.arange(0, BLOCK_N)[None, :]
        mask = (rows < n_rows) & (cols < n_cols)
        residual = tl.load(residual_ptr + rows * n_cols + cols, mask=mask, other=0.0)
        acc += residual.to(tl.float32)
    finish_part(acc, 0, col, bias_ptr, y_ptr, pre_ptr, n_rows, n_cols, GELU)


@triton.jit(do_not_specialize=["n_rows", "splits"])
def linear_rows_kernel(
    x_ptr,  # [n_rows, depth]; with lse float32 [n_rows, splits, depth]
    scale_ptr,  # of a norm in front, [depth], or None
    shift_ptr,  # like scale
    lse_ptr,  # of attention's splits, float32 [n_rows, depth / head_dim, splits], or None
    weight_ptr,  # [n_cols, depth], any strides
    bias_ptr,  # [n_cols], or None
    residual_ptr,  # like y, which it may be, or None
    y_ptr,  # [n_rows, n_cols]
    pre_ptr,  # like y, or None
    n_rows,
    n_cols,
    depth,
    stride_n,
    stride_k,
    splits,
    head_dim,
    eps,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program owns a tile.
    mean, rstd = None, None
    if scale_ptr is not None:
        mean, rstd = row_statistics(x_ptr, n_rows, depth, eps, ROWS, BLOCK_K)
    linear_rows_tile(
        tl.program_id(0),
        mean,
        rstd,
        x_ptr,
        scale_ptr,
        shift_ptr,
        lse_ptr,
        weight_ptr,
        bias_ptr,
        residual_ptr,
        y_ptr,
        pre_ptr,
        n_rows,
        n_cols,
        depth,
        stride_n,
        stride_k,
        splits,
        head_dim,
        GELU,
        PRECISION,
        ROWS,
        BLOCK_N,
        BLOCK_K,
    )


def padded_rows(n_rows: int) -> int:
    """The rows that a program of few holds: 1, 2, 4 or 16."""
    return triton.next_power_of_2(n_rows) if n_rows <= 4 else SMALL


def options(weights: list[Tensor], n_rows: int) -> dict[str, Any]:
    """The constants of a kernel that reads these weights for so many rows, and how to launch it.

    A weight that lies column by column takes a tile as wide as a sector of memory.
    """
    rows = padded_rows(n_rows)
    by_column = any(w.stride(0) == 1 and w.stride(1) != 1 for w in weights)
    launch = launch_table.launch("linear_columns" if by_column else "linear_rows", weights[0], rows)
    return {"PRECISION": launch_table.precision(weights[0]), "ROWS": rows, **launch}


def linear_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    pre: Tensor | None = None,
    gelu: bool = False,
    norm: tuple[Tensor, Tensor, float] | None = None,
    lse: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Writes y = residual + act(f(x) weight^T + bias), act the tanh GELU or nothing, and pre, what
    went into act.

    f is LayerNorm by norm's scale, shift and eps; or the join of attention's splits, where lse is
    given; or nothing. x: [..., K] contiguous, at most 16 rows, of the weight's dtype or, with a
    norm, of any; to be joined float32 [N, splits, K], lse float32 [N, H, splits] in base 2.
    weight: [N, K], any strides; bias: [N], scale and shift: [K], contiguous and of its dtype; y,
    pre, residual: [..., N] contiguous, y may be the residual, which is for no GELU.
    """
    n_cols, depth = weight.shape
    n_rows = y.numel() // n_cols if n_cols else 0
    if n_rows == 0:
        return
    scale, shift, eps = norm or (None, None, 0.0)
    splits, head_dim = (1, 1) if lse is None else (lse.shape[2], depth // lse.shape[1])
    launch = options([weight], n_rows)
    on_grid(linear_rows_kernel, (triton.cdiv(n_cols, launch["BLOCK_N"]),))(
        x,
        scale,
        shift,
        lse,
        weight,
        bias,
        residual,
        y,
        pre,
        n_rows,
        n_cols,
        depth,
        *weight.stride(),
        splits,
        head_dim,
        eps,
        gelu,
        **launch,
    )
