"""The mask that the Triton kernels' dropout draws, by PyTorch's own operations: for a backward pass
that its kernel can't run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def keep_scale(seed: int, shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """What a tensor of this shape was multiplied by, 1 / (1 - p) or 0, in float32."""
    *rows, width = shape
    calls = -(-width // 4)  # of Philox, one for four neighbours of a row
    words = _philox(seed, torch.arange(math.prod(rows) * calls, device=device))
    words = torch.where(words > _LOW // 2, _LOW - words, words)
    drawn = (words.float() * 4.6566127342e-10).view(*rows, 4 * calls)[..., :width]
    return (drawn >= p).float() / (1 - p if p < 1 else 1)


def _philox(seed: int, calls: Tensor) -> Tensor:
    """The 32-bit words of Philox4x32-10 at these 64-bit counters: [N] -> [N, 4], int64."""
    a, b = calls & _LOW, calls >> 32
    c = d = torch.zeros_like(calls)
    low, high = seed & _LOW, seed >> 32
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (right >> 32 & _LOW) ^ b ^ low, right & _LOW
        c, d = (left >> 32 & _LOW) ^ d ^ high, left & _LOW
        low, high = (low + 0x9E3779B9) & _LOW, (high + 0xBB67AE85) & _LOW
    return torch.stack((a, b, c, d), dim=-1)
