"""Dropout's mask on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.cpu import _C


def dropout(x: Tensor, p: float, seed: int) -> None:
    """Drops elements of x in place and scales the others by 1 / (1 - p).

    x: [..., D] contiguous float32.
    """
    if x.numel() == 0:
        return
    cols = x.shape[-1] if x.dim() > 0 else 1
    _C.dropout(x.data_ptr(), x.numel() // cols, cols, seed, p, torch.get_num_threads())
