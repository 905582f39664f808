"""What a model's pieces consist of, by name, and the records that C++ reads it by: addresses,
strides and sizes as 64-bit integers.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

GRAIN = 1 << 20  # multiplications below which a second thread costs more than it saves


class Norm(NamedTuple):
    """The parameters of a LayerNorm, or their gradients: [D] each."""

    scale: Any
    shift: Any


class Linear(NamedTuple):
    """The parameters of a linear layer, or their gradients: [n_out, n_in], and [n_out] or None."""

    weight: Any
    bias: Any


class Block(NamedTuple):
    """The parameters of a transformer block of width D, or their gradients.

    query, key, value and out: [D, D]; up: [F, D]; down: [D, F].
    """

    norm1: Norm
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    norm2: Norm
    up: Linear
    down: Linear

    @classmethod
    def of(cls, flat: Iterable[Any]) -> Block:
        """From one sequence, as autograd has it."""
        one = iter(flat)
        return cls(*(kind(next(one), next(one)) for kind in _KINDS))  # type: ignore[arg-type]

    def flat(self) -> Iterator[Any]:
        """As one sequence, for autograd."""
        return (part for piece in self for part in piece)


class EmbeddingRecord(NamedTuple):
    """Token and position embeddings, [V, D] and [C, D], whose sum is all there is."""

    tok: Tensor
    pos: Tensor


class BlockRecord(NamedTuple):
    """A transformer block of this width: its parameters, sizes and dropouts."""

    parameters: Block
    width: int
    n_heads: int
    eps: float
    attention_p: float
    shortcut_p: float
    context_length: int


class EndRecord(NamedTuple):
    """The last norm, and the head behind it if there is one."""

    norm: Norm
    eps: float
    head: Linear | None


_KINDS = (Norm, Linear, Linear, Linear, Linear, Norm, Linear, Linear)


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


def norm_fields(norm: Norm, width: int) -> tuple[int, int] | None:
    """The addresses of a norm's scale and shift; None if C++ cannot read one."""
    scale, shift = address(norm.scale, width), address(norm.shift, width)
    return None if scale is None or shift is None else (scale, shift)


def block_fields(block: Block, width: int) -> tuple[int, ...] | None:
    """struct Block but for its caches; None if C++ cannot read a parameter."""
    if block.up.weight is None or block.up.weight.dim() != 2:
        return None
    hidden = block.up.weight.shape[0]
    parts = (
        norm_fields(block.norm1, width),
        linear_fields(*block.query, width, width),
        linear_fields(*block.key, width, width),
        linear_fields(*block.value, width, width),
        linear_fields(*block.out, width, width),
        norm_fields(block.norm2, width),
        linear_fields(*block.up, width, hidden),
        linear_fields(*block.down, hidden, width),
    )
    if None in parts:
        return None
    return tuple(field for part in parts for field in part)  # type: ignore[union-attr]


def linear_fields(
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
    """torch's number of threads, or one if the work is small."""
    return torch.get_num_threads() if multiplications > GRAIN else 1


@functools.lru_cache
def double(number: float) -> int:
    """The 64 bits of a float, for a record's field of that type."""
    bits: int = struct.unpack("=q", struct.pack("=d", number))[0]
    return bits
