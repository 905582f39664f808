"""The tanh GELU on the CPU, with or without a bias in front."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.cpu import _C


def bias_gelu(x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Writes y = gelu(x + bias).

    x, y: [..., N] contiguous, y may be x; bias: [N] contiguous or None. All float32.
    """
    if x.numel() == 0:
        return
    cols = x.shape[-1] if bias is not None else x.numel()
    _C.bias_gelu(
        x.data_ptr(),
        bias.data_ptr() if bias is not None else 0,
        y.data_ptr(),
        x.numel() // cols,
        cols,
        torch.get_num_threads(),
    )
