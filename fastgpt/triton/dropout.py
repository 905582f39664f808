"""Dropout's mask, drawn where it is used and drawn again in the backward pass: never stored.

Philox 4x32, one call for four neighbouring elements; bit for bit the mask of csrc/dropout.h.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton import launch_table
from fastgpt.triton.compilation import on_grid


@triton.jit
def kept(seed, calls, p):
    """Which elements of a tile [M, N] dropout keeps.

    calls: [M, N // 4] int64, the Philox call that serves each four neighbours of a row.
    """
    M: tl.constexpr = calls.shape[0]
    N: tl.constexpr = 4 * calls.shape[1]
    a, b, c, d = tl.rand4x(seed, calls)
    fours = tl.join(tl.join(a, c), tl.join(b, d))  # [M, N // 4, 2, 2]
    return tl.reshape(fours, (M, N)) >= p


@triton.jit
def keep_scale(seed, rows, first_col, n_cols, p, BLOCK: tl.constexpr):
    """What dropout multiplies the tile [rows, first_col .. first_col + BLOCK) of n_cols columns
    by: 1 / (1 - p) or 0, the same whatever the tiles. first_col, BLOCK: multiples of 4.
    """
    calls = rows.to(tl.int64)[:, None] * tl.cdiv(n_cols, 4) + first_col // 4
    calls += tl.arange(0, BLOCK // 4)[None, :]
    return tl.where(kept(seed, calls, p), 1.0 / (1.0 - p), 0.0)


@triton.jit(do_not_specialize=["n_rows", "seed"])
def dropout_kernel(
    x_ptr,  # [n_rows, n_cols]
    n_rows,
    n_cols,
    p,
    seed,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program owns ROWS rows of BLOCK columns.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    cols = first + tl.arange(0, BLOCK)
    ptrs = x_ptr + rows[:, None].to(tl.int64) * n_cols + cols[None, :]
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    tl.store(ptrs, x * keep_scale(seed, rows, first, n_cols, p, BLOCK), mask=mask)


def dropout(x: Tensor, p: float, seed: int) -> None:
    """Drops elements of x in place and scales the others by 1 / (1 - p).

    x: [..., D] contiguous, any floating dtype.
    """
    if x.numel() == 0:
        return
    n_cols = x.shape[-1] if x.ndim else 1
    n_rows = x.numel() // n_cols
    launch = launch_table.launch("dropout", x)
    grid = (triton.cdiv(n_rows, launch["ROWS"]), triton.cdiv(n_cols, launch["BLOCK"]))
    on_grid(dropout_kernel, grid)(x, n_rows, n_cols, p, seed, **launch)
