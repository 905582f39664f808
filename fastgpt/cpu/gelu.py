"""The tanh GELU on the CPU, with or without a bias in front."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.cpu import _C
from fastgpt.cpu.records import data


def bias_gelu(x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Writes y = gelu(x + bias).

    x, y: [..., N] contiguous, y may be x; bias: [N] contiguous or None. All float32.
    """
    if x.numel() == 0:
        return
    cols = x.shape[-1] if bias is not None else x.numel()
    _C.bias_gelu(
        x.data_ptr(),
        data(bias),
        y.data_ptr(),
        x.numel() // cols,
        cols,
        torch.get_num_threads(),
    )


def bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, dx: Tensor, dbias: Tensor | None = None
) -> None:
    """Writes dx = dy gelu'(x + bias) and dbias, its sum over the rows.

    dy, x, dx: [..., N] contiguous, dx may be dy; bias, dbias: [N] contiguous. All float32.
    """
    if x.numel() == 0:
        if dbias is not None:
            dbias.zero_()
        return
    cols = x.shape[-1] if bias is not None else x.numel()
    _C.bias_gelu_backward(
        dy.data_ptr(),
        x.data_ptr(),
        data(bias),
        dx.data_ptr(),
        data(dbias),
        x.numel() // cols,
        cols,
        torch.get_num_threads(),
    )
