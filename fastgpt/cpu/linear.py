"""The product of a linear layer on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt.cpu import _C
from fastgpt.cpu.records import data, linear_fields, linear_gradient, shape_of, threads_for
from fastgpt.cpu.workspace import on_large_pages, workspace


def takes(weight: Any, bias: Tensor | None) -> bool:
    """Whether a weight lies as the kernel can read it; any but an odd view does, or one
    that is too deep for ``batch_invariant``, inside it.
    """
    n_out, n_in = shape_of(weight)
    dtype = weight.dtype if isinstance(weight, Tensor) else torch.float32
    return n_in > 0 and linear_fields(weight, bias, dtype, n_in, n_out) is not None


def linear(
    x: Tensor, weight: Any, bias: Tensor | None, y: Tensor, owner: object | None = None
) -> None:
    """Writes y = x W^T + bias.

    x: [..., n_in], y: [..., n_out], contiguous; weight: [n_out, n_in], row- or column-major, or
    quantised; bias: [n_out] contiguous or None. All else is float32. The owner keeps the scratch
    memory for its next call.
    """
    if y.numel() == 0:
        return
    n_out, n_in = y.shape[-1], x.shape[-1]
    record, rows = linear_fields(weight, bias, torch.float32, n_in, n_out), x.numel() // n_in
    assert record is not None
    threads = threads_for(rows * n_in * n_out)
    on_large_pages(y)
    narrow = not isinstance(weight, Tensor)
    with workspace(owner, threads * _C.product_scratch(narrow) + 32) as scratch:
        _C.linear(record, x.data_ptr(), y.data_ptr(), rows, scratch, threads)


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    owner: object | None = None,
) -> None:
    """Writes the gradients that are given.

    dy: [..., n_out], x, dx: [..., n_in], contiguous; dweight: as ``gradient_like`` makes it.
    """
    if x.numel() == 0 or dy.numel() == 0:
        for gradient in (dx, dweight, dbias):
            if gradient is not None:
                gradient.zero_()
        return
    n_out, n_in = weight.shape
    record, rows = linear_fields(weight, None, torch.float32, n_in, n_out), x.numel() // n_in
    assert record is not None
    threads = threads_for(rows * n_in * n_out)
    for gradient in (dx, dweight):
        if gradient is not None:
            on_large_pages(gradient)
    with workspace(owner, threads * _C.product_scratch(True) + 32) as scratch:
        _C.linear_backward(
            record,
            dy.data_ptr(),
            x.data_ptr(),
            data(dx),
            linear_gradient(dweight, dbias),
            rows,
            scratch,
            threads,
        )
