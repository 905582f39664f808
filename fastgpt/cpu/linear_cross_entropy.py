"""The cross entropy of a linear head on the CPU, without its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.cpu import _C
from fastgpt.cpu.linear import takes as takes
from fastgpt.cpu.records import data, linear_fields, linear_gradient, threads_for
from fastgpt.cpu.workspace import on_large_pages, workspace


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    loss: Tensor,
    upstream: Tensor | None = None,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
    owner: object | None = None,
) -> None:
    """Writes loss = -log_softmax(x W^T)[targets], 0 where the target is ignore_index, and for
    upstream, the gradients of the losses, dx and dweight where they are given.

    x, dx: [N, D] contiguous; weight: [V, D], row- or column-major; targets: [N] int64 contiguous,
    in range; loss, upstream: [N] contiguous, float32; dweight: as ``gradient_like`` makes it. The
    others are of one dtype; sums are float32 whatever it is, and bfloat16 factors stay that.
    """
    V, D = weight.shape
    N = x.shape[0]
    if N == 0:
        if dweight is not None:
            dweight.zero_()
        return
    record = linear_fields(weight, None, weight.dtype, D, V)
    assert record is not None
    wide, wide_dx, wide_dweight = x.float(), _wide(dx), _wide(dweight)
    if wide_dweight is not None:
        on_large_pages(wide_dweight)
    threads = threads_for(N * D * V)
    with workspace(owner, _C.linear_cross_entropy_workspace(N, V, threads)) as scratch:
        _C.linear_cross_entropy(
            record,
            wide.data_ptr(),
            targets.data_ptr(),
            ignore_index,
            loss.data_ptr(),
            data(upstream),
            data(wide_dx),
            linear_gradient(wide_dweight, None),
            N,
            scratch,
            threads,
        )
    for gradient, found in ((dx, wide_dx), (dweight, wide_dweight)):
        if gradient is not None and found is not None and found is not gradient:
            gradient.copy_(found)


def _wide(gradient: Tensor | None) -> Tensor | None:
    """Where its sums are made: itself if it is float32."""
    if gradient is None or gradient.dtype is torch.float32:
        return gradient
    return torch.empty_like(gradient, dtype=torch.float32)
