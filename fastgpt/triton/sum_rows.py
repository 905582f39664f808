"""The second half of every weight gradient: the programs' float32 partial sums, added up in a fixed
order, so that results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton import launch_table
from fastgpt.triton.compilation import on_grid


@triton.jit(do_not_specialize=["n_rows"])
def sum_rows_kernel(
    partial_ptr,  # [1 or 2, n_rows, n_cols] float32
    first_ptr,  # [n_cols], the sum of partial[0], or None
    second_ptr,  # [n_cols], the sum of partial[1], or None
    n_rows,
    n_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One program owns BLOCK_N columns of one of the two.
    which = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    partial_ptr += which.to(tl.int64) * n_rows * n_cols
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, n_rows, BLOCK_M):
        row = start + rows[:, None]
        mask = (row < n_rows) & (cols[None, :] < n_cols)
        offset = row.to(tl.int64) * n_cols + cols[None, :]
        acc += tl.load(partial_ptr + offset, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    total = tl.sum(acc, axis=0)
    if first_ptr is not None:
        tl.store(first_ptr + cols, total, mask=cols < tl.where(which == 0, n_cols, 0))
    if second_ptr is not None:
        tl.store(second_ptr + cols, total, mask=cols < tl.where(which == 1, n_cols, 0))


def sum_rows(partial: Tensor, first: Tensor | None, second: Tensor | None = None) -> None:
    """Writes first = partial[0].sum(0) and second = partial[1].sum(0).

    partial: [1 or 2, R, N] float32 contiguous; first, second: [N] contiguous, or None.
    """
    _, n_rows, n_cols = partial.shape
    launch = launch_table.launch("sum_rows", partial)
    grid = (triton.cdiv(n_cols, launch["BLOCK_N"]), 1 if second is None else 2)
    on_grid(sum_rows_kernel, grid)(partial, first, second, n_rows, n_cols, **launch)
