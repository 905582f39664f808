"""LayerNorm in Triton, with or without a residual add, and the branch's dropout, in front.

A program holds whole rows in registers. Statistics are float32, the variance two-pass. The backward
pass runs two programs a multiprocessor, each of which sums the weights' gradients of its rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton import launch_table
from fastgpt.triton.compilation import on_grid
from fastgpt.triton.dropout import keep_scale
from fastgpt.triton.sum_rows import sum_rows

# Wider rows do not fit the registers of one program.
MAX_WIDTH = launch_table.WIDEST["layer_norm"]


@triton.jit(do_not_specialize=["n_rows", "seed"])
def layer_norm_fwd_kernel(
    x_ptr,  # [n_rows, n_cols]
    branch_ptr,  # like x, or None
    weight_ptr,  # [n_cols]
    bias_ptr,  # [n_cols]
    total_ptr,  # like x, with a branch
    y_ptr,  # like x
    mean_ptr,  # [n_rows] float32, or None
    rstd_ptr,  # [n_rows] float32, or None
    n_rows,
    n_cols,
    eps,
    dropout_p,
    seed,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program owns ROWS rows.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    offset = rows[:, None].to(tl.int64) * n_cols + cols[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            branch *= keep_scale(seed, rows, 0, n_cols, dropout_p, BLOCK)
        total = (x + branch).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offset, total, mask=mask)
        x = total.to(tl.float32)
    mean = tl.sum(x, axis=1) / n_cols
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / n_cols + eps)
    weight = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + offset, y, mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit(do_not_specialize=["n_rows", "seed"])
def layer_norm_bwd_kernel(
    dy_ptr,  # [n_rows, n_cols]
    x_ptr,  # what was normalised, like dy
    weight_ptr,  # [n_cols]
    mean_ptr,  # [n_rows] float32
    rstd_ptr,  # [n_rows] float32
    dtotal_ptr,  # like dy: what reaches the sum past the norm, or None
    dx_ptr,  # like dy, or None
    dbranch_ptr,  # like dy: dx through the dropout, or None
    partial_ptr,  # [2, programs, n_cols] float32: dweight and dbias, or None
    n_rows,
    n_cols,
    dropout_p,
    seed,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program owns every programs-th tile of ROWS rows.
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(program * ROWS, n_rows, programs * ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
        offset = rows[:, None].to(tl.int64) * n_cols + cols[None, :]
        dy = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        normed = tl.where(mask, (x - mean) * rstd, 0.0)
        if partial_ptr is not None:
            dweight += dy * normed
            dbias += dy
        if dx_ptr is not None:
            g = dy * weight
            along = tl.sum(g * normed, axis=1)[:, None] / n_cols
            level = tl.sum(g, axis=1)[:, None] / n_cols
            dx = (g - normed * along - level) * rstd
            if dtotal_ptr is not None:
                dx += tl.load(dtotal_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + offset, dx, mask=mask)
            if dbranch_ptr is not None:
                if DROPOUT:
                    dx *= keep_scale(seed, rows, 0, n_cols, dropout_p, BLOCK)
                tl.store(dbranch_ptr + offset, dx, mask=mask)
    if partial_ptr is not None:
        partial_ptr += program.to(tl.int64) * n_cols + cols
        tl.store(partial_ptr, tl.sum(dweight, axis=0), mask=cols < n_cols)
        partial_ptr += programs.to(tl.int64) * n_cols
        tl.store(partial_ptr, tl.sum(dbias, axis=0), mask=cols < n_cols)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    y: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    branch: Tensor | None = None,
    total: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> None:
    """Writes y = LayerNorm(x), or total = x + dropout(branch) and y = LayerNorm(total).

    x, branch, total, y: [..., D] contiguous, D at most MAX_WIDTH; weight, bias: [D] contiguous;
    mean, rstd: one a row, float32. The others of any floating dtype. total may be x. The sum is
    rounded to total's dtype before it is normalised.
    """
    if x.numel() == 0:
        return
    n_cols = x.shape[-1]
    n_rows = x.numel() // n_cols
    BLOCK = max(4, triton.next_power_of_2(n_cols))  # dropout's numbers come in fours
    launch = launch_table.launch("layer_norm_fwd", x, BLOCK)
    on_grid(layer_norm_fwd_kernel, (triton.cdiv(n_rows, launch["ROWS"]),))(
        x,
        branch,
        weight,
        bias,
        total,
        y,
        mean,
        rstd,
        n_rows,
        n_cols,
        eps,
        dropout_p,
        seed,
        DROPOUT=dropout_p > 0,
        BLOCK=BLOCK,
        **launch,
    )


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    dtotal: Tensor | None = None,
    dbranch: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> None:
    """Writes the gradients of LayerNorm, None if not wanted.

    dy, x, dx, dtotal, dbranch: [..., D] contiguous; weight, dweight, dbias: [D] contiguous; mean,
    rstd: one a row, float32, as the forward pass wrote them. x is what was normalised, the sum
    where there was one. dx is the gradient through the norm, plus dtotal where it is given. dbranch
    is dx through the branch's dropout, of any floating dtype, and is written only beside dx. dx may
    be dy or dtotal.
    """
    if x.numel() == 0:
        for empty in (dweight, dbias):
            if empty is not None:
                empty.zero_()
        return
    n_cols = x.shape[-1]
    n_rows = x.numel() // n_cols
    BLOCK = max(4, triton.next_power_of_2(n_cols))  # dropout's numbers come in fours
    launch = launch_table.launch("layer_norm_bwd", x, BLOCK)
    wanted = 2 * launch_table.device_of(x).multiprocessors
    programs = min(wanted, triton.cdiv(n_rows, launch["ROWS"]))
    partial = None
    if dweight is not None or dbias is not None:
        partial = torch.empty((2, programs, n_cols), dtype=torch.float32, device=x.device)
    on_grid(layer_norm_bwd_kernel, (programs,))(
        dy,
        x,
        weight,
        mean,
        rstd,
        dtotal,
        dx,
        dbranch,
        partial,
        n_rows,
        n_cols,
        dropout_p,
        seed,
        DROPOUT=dropout_p > 0,
        BLOCK=BLOCK,
        **launch,
    )
    if partial is not None:
        sum_rows(partial, dweight, dbias)
