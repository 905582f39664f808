"""LayerNorm on the CPU, with or without a residual add in front."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.cpu import _C


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
) -> None:
    """Writes y = LayerNorm(x), or total = x + branch and y = LayerNorm(total).

    x, branch, total, y: [..., D] contiguous; weight, bias: [D] contiguous; mean, rstd: one a row.
    All float32. total may be x.
    """
    cols = x.shape[-1]
    if x.numel() == 0:
        return
    _C.layer_norm(
        x.data_ptr(),
        branch.data_ptr() if branch is not None else 0,
        weight.data_ptr(),
        bias.data_ptr(),
        total.data_ptr() if total is not None else 0,
        y.data_ptr(),
        mean.data_ptr() if mean is not None else 0,
        rstd.data_ptr() if rstd is not None else 0,
        x.numel() // cols,
        cols,
        eps,
        torch.get_num_threads(),
    )
