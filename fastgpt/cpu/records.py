"""The records that C++ reads tensors by: addresses, strides and sizes as 64-bit integers."""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor, nn

GRAIN = 1 << 20  # multiplications below which a second thread costs more than it saves


def address(tensor: Tensor | None, *shape: int, contiguous: bool = True) -> int | None:
    """Where a float32 CPU tensor of this shape starts; None for any other, or not contiguous."""
    if (
        tensor is None
        or tensor.dtype is not torch.float32
        or tensor.shape != shape
        or not tensor.is_cpu
        or (contiguous and not tensor.is_contiguous())
        or (type(tensor) is not nn.Parameter and type(tensor) is not Tensor)
    ):
        return None
    return tensor.data_ptr()


def linear(
    weight: Tensor | None, bias: Tensor | None, n_in: int, n_out: int
) -> tuple[int, ...] | None:
    """struct Linear for a weight [n_out, n_in], row-major or column-major; None for any other."""
    if (
        weight is None
        or weight.dtype is not torch.float32
        or weight.shape != (n_out, n_in)
        or not weight.is_cpu
        or (type(weight) is not nn.Parameter and type(weight) is not Tensor)
    ):
        return None
    row, col = weight.stride()
    if not (col == 1 and row >= n_in) and not (row == 1 and col >= n_out):
        return None
    at = 0
    if bias is not None:
        found = address(bias, n_out)
        if found is None:
            return None
        at = found
    return weight.data_ptr(), row, col, at, n_out, n_in


def linear_gradient(dweight: Tensor | None, dbias: Tensor | None) -> tuple[int, ...]:
    """struct LinearGradient for gradients made by ``gradient_like``."""
    row, col = (1, 1) if dweight is None else dweight.stride()
    return data(dweight), row, col, data(dbias)


def gradient_like(weight: Tensor) -> Tensor:
    """An empty gradient in the layout that autograd wants for this weight, [n_out, n_in]."""
    like = torch.empty_like(weight)
    row_or_column_major = like.stride(1) == 1 or like.stride(0) == 1
    return like if row_or_column_major else like.new_empty(like.shape)


def data(tensor: Tensor | None) -> int:
    """The address of a tensor, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def threads_for(multiplications: int) -> int:
    """torch's number of threads, or one where the work is small."""
    return torch.get_num_threads() if multiplications > GRAIN else 1


@functools.lru_cache
def double(number: float) -> int:
    """The 64 bits of a float, for a record's field of that type."""
    bits: int = struct.unpack("=q", struct.pack("=d", number))[0]
    return bits
