"""Dropout whose mask is that of the fused operations (Srivastava et al., JMLR 15, 2014)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch
from fastgpt.ops.dropout_seed import check_probability, draw_seed


@dispatch.falls_back
def dropout(x: Tensor, p: float) -> Tensor:
    """x with each element dropped with probability p, the others scaled by 1 / (1 - p).

    The mask is the one that a fused operation would draw in its place, whatever the dtype. On the
    reference backend, under torch.compile and inside a transform of torch.func it is PyTorch's own.

    Args:
        x: any shape, any floating dtype.
        p: the probability. Draws one number from torch's generator for the device if it is not 0.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: p is not in [0, 1].
        BackendError: a backend asked for by name cannot run on x's device.
    """
    check_probability(p)
    if p == 0 or x.numel() == 0:
        return x
    if not dispatch.readable(x) or not x.is_floating_point():
        return F.dropout(x, p)
    mask = torch.ones(x.shape, dtype=torch.float32, device=x.device)
    kernels = dispatch.kernels("dropout", mask)
    if kernels is None:
        return F.dropout(x, p)
    kernels.dropout(mask, p, draw_seed(x.device, p))
    if x.dtype != torch.float32 and p < 1:
        mask = (mask > 0).to(x.dtype).div_(1 - p)
    return x * mask.to(x.dtype)
