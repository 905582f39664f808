"""Cross entropy of logits in Triton: one read for the loss, one read and write for the gradient,
which takes the logits' place.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton import launch_table
from fastgpt.triton.compilation import on_grid


@triton.jit
def _longer(peak, total, x):
    """The running maximum and sum of exponentials, with a block of logits more."""
    new = tl.maximum(peak, tl.max(x, axis=0))
    # Where all was -inf so far, -inf - -inf would be NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(peak - base) + tl.sum(tl.exp(x - base), axis=0)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_fwd_kernel(
    logits_ptr,  # [n_rows, n_cols], rows stride_row apart
    targets_ptr,  # [n_rows]
    loss_ptr,  # [n_rows] float32
    lse_ptr,  # [n_rows] float32 or float64
    stride_row,
    n_cols,
    ignore_index,
    BLOCK: tl.constexpr,
):
    # One program owns a row.
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    cols = tl.arange(0, BLOCK)
    peak, total = float("-inf"), 0.0
    # Whole blocks need no mask, so that they are read 16 bytes at a time.
    whole = n_cols // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        x = tl.load(logits_ptr + start + cols).to(tl.float32)  # [BLOCK]
        peak, total = _longer(peak, total, x)
    if whole < n_cols:
        mask = whole + cols < n_cols
        x = tl.load(logits_ptr + whole + cols, mask=mask, other=float("-inf")).to(tl.float32)
        peak, total = _longer(peak, total, x)
    log_total = tl.log(total)
    target = tl.load(targets_ptr + row).to(tl.int64)
    inside = (target >= 0) & (target < n_cols)
    # A target outside the vocabulary reads nothing and gives NaN.
    at_target = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(target == ignore_index, 0.0, peak - at_target + log_total))
    wide = lse_ptr.dtype.element_ty
    tl.store(lse_ptr + row, tl.cast(peak, wide) + tl.cast(log_total, wide))


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_bwd_kernel(
    logits_ptr,  # [n_rows, n_cols], rows stride_row apart, becomes its gradient
    targets_ptr,  # [n_rows]
    lse_ptr,  # [n_rows] float32 or float64
    dloss_ptr,  # [n_rows], stride_dloss apart
    stride_row,
    stride_dloss,
    n_cols,
    ignore_index,
    BLOCK: tl.constexpr,
):
    # One program owns a block of a row.
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    target = tl.load(targets_ptr + row).to(tl.int64)
    lse = tl.load(lse_ptr + row)
    high = lse.to(tl.float32)
    low = (lse - high).to(tl.float32)
    dloss = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
    start = tl.program_id(1) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    # Whole blocks need no mask, so that they are read 16 bytes at a time.
    if start + BLOCK <= n_cols:
        x = tl.load(logits_ptr + cols).to(tl.float32)  # [BLOCK]
        dx = (tl.exp(x - high - low) - tl.where(cols == target, 1.0, 0.0)) * dloss
        tl.store(logits_ptr + cols, tl.where(target == ignore_index, 0.0, dx))
    else:
        mask = cols < n_cols
        x = tl.load(logits_ptr + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
        dx = (tl.exp(x - high - low) - tl.where(cols == target, 1.0, 0.0)) * dloss
        tl.store(logits_ptr + cols, tl.where(target == ignore_index, 0.0, dx), mask=mask)


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, loss: Tensor, lse: Tensor
) -> None:
    """Writes each row's log-sum-exp and its loss, lse - logits[target], 0 where it is ignored.

    logits: [N, V], its rows contiguous and any stride apart, any floating dtype; targets: [N]
    contiguous, any integer dtype; loss: [N] float32; lse: [N], float32 or float64. V > 0. A float32
    lse of 10 gives the gradient a relative error of 1e-6, which only matters to float32 logits.
    """
    n_rows, n_cols = logits.shape
    if n_rows == 0:
        return
    on_grid(cross_entropy_fwd_kernel, (n_rows,))(
        logits,
        targets,
        loss,
        lse,
        logits.stride(0),
        n_cols,
        ignore_index,
        **launch_table.launch("cross_entropy_fwd", logits),
    )


def cross_entropy_backward(
    logits: Tensor, targets: Tensor, ignore_index: int, lse: Tensor, dloss: Tensor
) -> None:
    """Overwrites the logits by their gradient, (softmax - one at the target) dloss.

    logits, targets, lse: as the forward pass took and wrote them; dloss: [N], any stride and
    floating dtype. Ignored rows become zero.
    """
    n_rows, n_cols = logits.shape
    if n_rows == 0:
        return
    launch = launch_table.launch("cross_entropy_bwd", logits)
    on_grid(cross_entropy_bwd_kernel, (n_rows, triton.cdiv(n_cols, launch["BLOCK"])))(
        logits,
        targets,
        lse,
        dloss,
        logits.stride(0),
        dloss.stride(0),
        n_cols,
        ignore_index,
        **launch,
    )
