"""The tanh GELU in Triton, with or without a bias in front, and its gradient fused with the bias's.

0.5 x (1 + tanh(u)) is x sigmoid(2 u), which needs no tanh.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton import launch_table
from fastgpt.triton.compilation import on_grid
from fastgpt.triton.sum_rows import sum_rows


@triton.jit
def gelu(x):
    """x: float32."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gelu_slope(x):
    """The derivative of gelu at x, float32."""
    z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    e = tl.exp(-tl.abs(z))
    s = 1.0 / (1.0 + e)  # sigmoid(|z|); from e, 1 - s does not cancel
    bell = x * (e * s * s)
    return tl.where(z < 0, e * s, s) + bell * (1.5957691216057308 * (1.0 + 0.134145 * x * x))


@triton.jit(do_not_specialize=["n_rows"])
def bias_gelu_fwd_kernel(
    x_ptr,  # [n_rows, n_cols]
    bias_ptr,  # [n_cols], or None
    y_ptr,  # like x
    n_rows,
    n_cols,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program owns ROWS rows of BLOCK columns.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    offset = rows[:, None].to(tl.int64) * n_cols + cols[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offset, gelu(x), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def bias_gelu_bwd_kernel(
    dy_ptr,  # [n_rows, n_cols]
    x_ptr,  # like dy
    bias_ptr,  # [n_cols], or None
    dx_ptr,  # like dy
    partial_ptr,  # [programs, n_cols] float32: dbias, or None
    n_rows,
    n_cols,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program owns every programs-th tile of ROWS rows in BLOCK columns.
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias = tl.zeros([1, BLOCK], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(program * ROWS, n_rows, programs * ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
        offset = rows[:, None].to(tl.int64) * n_cols + cols[None, :]
        dy = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        dx = dy * gelu_slope(x + bias)
        dbias += dx
        tl.store(dx_ptr + offset, dx, mask=mask)
    if partial_ptr is not None:
        into = partial_ptr + program.to(tl.int64) * n_cols + cols
        tl.store(into, tl.sum(dbias, axis=0), mask=cols < n_cols)


def _rows_and_cols(x: Tensor) -> tuple[int, int]:
    n_cols = x.shape[-1] if x.ndim else 1
    return x.numel() // n_cols, n_cols


def bias_gelu(x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Writes y = gelu(x + bias).

    x, y: [..., N] contiguous, y may be x; bias: [N] contiguous or None. Any floating dtypes.
    """
    if x.numel() == 0:
        return
    n_rows, n_cols = _rows_and_cols(x)
    launch = launch_table.launch("bias_gelu_fwd", x)
    grid = (triton.cdiv(n_rows, launch["ROWS"]), triton.cdiv(n_cols, launch["BLOCK"]))
    on_grid(bias_gelu_fwd_kernel, grid)(x, bias, y, n_rows, n_cols, **launch)


def bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, dx: Tensor, dbias: Tensor | None = None
) -> None:
    """Writes dx = dy gelu'(x + bias) and dbias, the sum of dx over the rows.

    dy, x, dx: [..., N] contiguous, dx may be dy or x; bias, dbias: [N] contiguous or None. Where x
    already holds the bias, bias is None and dbias may still be wanted.
    """
    if x.numel() == 0:
        if dbias is not None:
            dbias.zero_()
        return
    n_rows, n_cols = _rows_and_cols(x)
    launch = launch_table.launch("bias_gelu_bwd", x)
    across = triton.cdiv(n_cols, launch["BLOCK"])
    # Four programs a multiprocessor where there are rows enough.
    wanted = triton.cdiv(4 * launch_table.device_of(x).multiprocessors, across)
    programs = min(wanted, triton.cdiv(n_rows, launch["ROWS"]))
    partial = None
    if dbias is not None:
        partial = torch.empty((1, programs, n_cols), dtype=torch.float32, device=x.device)
    on_grid(bias_gelu_bwd_kernel, (programs, across))(
        dy, x, bias, dx, partial, n_rows, n_cols, **launch
    )
    if partial is not None:
        sum_rows(partial, dbias)
