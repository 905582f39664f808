"""Dropout's mask, drawn where it is used and drawn again in the backward pass: never stored."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_scale(seed, offset, p):
    """What dropout multiplies the elements at these offsets by: 1 / (1 - p) or 0.

    offset: int64, the element's place in its contiguous tensor. Philox 4x32, one draw an element.
    """
    return tl.where(tl.rand(seed, offset) >= p, 1.0 / (1.0 - p), 0.0)
