"""What the machine can do at most: multiply-adds out of registers, and reads of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.cpu import _C

DTYPES = (torch.float32,)  # of the factors that ``multiply_adds`` knows


def multiply_adds(ends: Tensor, threads: int) -> int:
    """Runs pieces of fused multiply-adds; returns the floating-point operations of one piece.

    ends: [pieces, 2] float64; of each piece, when it was done (seconds) and by which thread.
    """
    operations: int = _C.multiply_adds_float32(ends.data_ptr(), len(ends), threads)
    return operations


def read(block: Tensor, piece: int, ends: Tensor, threads: int) -> None:
    """Reads a float32 block, of a multiple of `piece` floats, piece by piece, over and over.

    ends: as for ``multiply_adds``.
    """
    _C.read_float32(block.data_ptr(), block.numel(), piece, ends.data_ptr(), len(ends), threads)
