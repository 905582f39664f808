"""The mask of a fused dropout, made again for a backward pass by PyTorch's own operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.dispatch import Launchers
from fastgpt.ops.dropout_seed import refuse_double_backward
from fastgpt.triton.dropout_mask import keep_scale


def mask_again(
    kernels: Any, drop: tuple[float, int], shape: Sequence[int], device: torch.device
) -> Tensor | None:
    """What these kernels multiplied a tensor of this shape by; None if nothing was dropped.

    drop: the probability and the seed.

    Raises:
        RuntimeError: the kernels are not Triton's, and something was dropped.
    """
    p, seed = drop
    if p == 0:
        return None
    if not isinstance(kernels, Launchers):
        refuse_double_backward(p)
    return keep_scale(seed, shape, p, device)
