"""The cross entropy of a linear head on the CPU, without its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.cpu import _C
from fastgpt.cpu.linear import takes as takes
from fastgpt.cpu.records import data, linear_fields, linear_gradient, threads_for
from fastgpt.cpu.workspace import workspace


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
    in range; loss, upstream: [N] contiguous; dweight: as ``gradient_like`` makes it.
    """
    V, D = weight.shape
    N = x.shape[0]
    if N == 0:
        if dweight is not None:
            dweight.zero_()
        return
    record = linear_fields(weight, None, torch.float32, D, V)
    assert record is not None
    threads = threads_for(N * D * V)
    with workspace(owner, _C.linear_cross_entropy_workspace(N, V, threads)) as scratch:
        _C.linear_cross_entropy(
            record,
            x.data_ptr(),
            targets.data_ptr(),
            ignore_index,
            loss.data_ptr(),
            data(upstream),
            data(dx),
            linear_gradient(dweight, None),
            N,
            scratch,
            threads,
        )
