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

from fastgpt import batch_invariance
from fastgpt.cpu import _C
from fastgpt.quantized_weight import Int4Weight, Int8Weight

# As csrc/kernels.h counts them.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT8, _INT8_DYNAMIC, _INT4 = 3, 4, 5
GRAIN = 1 << 20  # multiplications below which a second thread costs more than it saves


class Norm(NamedTuple):
    """The parameters of a LayerNorm, or their gradients: [D] each."""

    scale: Any
    shift: Any


class Dynamic(NamedTuple):
    """A weight whose product takes int8 activations too."""

    weight: Int8Weight


class Linear(NamedTuple):
    """The parameters of a linear layer, or their gradients: [n_out, n_in], and [n_out] or None.

    The weight may be an ``Int8Weight``, an ``Int4Weight`` or ``Dynamic``.
    """

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
    """Token and position embeddings, [V, D] and [C, D], whose sum is all there is.

    The first may be quantised.
    """

    tok: Any
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

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the first parameter, which the others share if C++ can read them."""
        return getattr(self.parameters.norm1.scale, "dtype", None)

    def fields(self, dtype: torch.dtype) -> tuple[int, ...] | None:
        """struct Block but for its caches; None if C++ cannot read a parameter, or if one is of
        another dtype.
        """
        return block_fields(self.parameters, dtype, self.width)


class EndRecord(NamedTuple):
    """The last norm, and the head behind it if there is one."""

    norm: Norm
    eps: float
    head: Linear | None


_KINDS = (Norm, Linear, Linear, Linear, Linear, Norm, Linear, Linear)


def readable(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> bool:
    """Whether a tensor is a plain one of this dtype and shape, on the CPU."""
    return (
        tensor is not None
        and tensor.dtype is dtype
        and tensor.shape == shape
        and tensor.is_cpu
        and (type(tensor) is nn.Parameter or type(tensor) is Tensor)
    )


def numbers(tensor: Any, dtype: torch.dtype, *shape: int) -> tuple[int, int] | None:
    """struct Numbers for a contiguous tensor of this dtype and shape; None for any other."""
    if not readable(tensor, dtype, *shape) or not tensor.is_contiguous():
        return None
    return tensor.data_ptr(), FORMATS[dtype]


def norm_fields(norm: Norm, dtype: torch.dtype, width: int) -> tuple[int, ...] | None:
    """The two Numbers of a norm; None if C++ cannot read one."""
    scale, shift = numbers(norm.scale, dtype, width), numbers(norm.shift, dtype, width)
    return None if scale is None or shift is None else scale + shift


def block_fields(block: Block, dtype: torch.dtype, width: int) -> tuple[int, ...] | None:
    """struct Block but for its caches; None if C++ cannot read a parameter, or if one is of
    another dtype.
    """
    hidden = n_rows(block.up.weight)
    parts = (
        norm_fields(block.norm1, dtype, width),
        linear_fields(*block.query, dtype, width, width),
        linear_fields(*block.key, dtype, width, width),
        linear_fields(*block.value, dtype, width, width),
        linear_fields(*block.out, dtype, width, width),
        norm_fields(block.norm2, dtype, width),
        linear_fields(*block.up, dtype, width, hidden),
        linear_fields(*block.down, dtype, hidden, width),
    )
    if None in parts:
        return None
    return tuple(field for part in parts for field in part)  # type: ignore[union-attr]


def shape_of(weight: Any) -> tuple[int, int]:
    """[n_out, n_in] of a weight, quantised or not; nothing for what is no matrix."""
    if isinstance(weight, Dynamic):
        weight = weight.weight
    values = weight[0] if isinstance(weight, tuple) else weight
    if values is None or values.dim() != 2:
        return 0, 0
    n_out, n_in = values.shape
    return n_out, 2 * n_in if isinstance(weight, Int4Weight) else n_in


def n_rows(weight: Any) -> int:
    """How many rows a weight has, quantised or not; 0 for what is no matrix."""
    return shape_of(weight)[0]


def linear_fields(
    weight: Any, bias: Tensor | None, dtype: torch.dtype, n_in: int, n_out: int
) -> tuple[int, ...] | None:
    """struct Linear for a weight of [n_out, n_in], quantised or of this dtype as the bias is; None
    for any other.
    """
    fields, at = weight_fields(weight, dtype, n_in, n_out), (0, 0)
    if bias is not None:
        found = numbers(bias, dtype, n_out)
        if found is None:
            return None
        at = found
    return None if fields is None else (*fields, *at, n_out, n_in)


def weight_fields(weight: Any, dtype: torch.dtype, n_in: int, n_out: int) -> tuple[int, ...] | None:
    """struct Weight for one of [n_out, n_in], row- or column-major, quantised or of this dtype;
    None for any other, and for one that is too deep for
    ``batch_invariant``, inside it.
    """
    if isinstance(weight, tuple):
        return _quantized_fields(weight, n_in, n_out)
    if dtype not in FORMATS or not readable(weight, dtype, n_out, n_in):
        return None
    row, col = weight.stride()
    if not (col == 1 and row >= n_in) and not (row == 1 and col >= n_out):
        return None
    if col == 1 and _too_deep(n_in):
        return None
    return weight.data_ptr(), row, col, FORMATS[dtype], 0, 0, 0, int(batch_invariance.asked())


def _too_deep(n_in: int) -> bool:
    """Whether a row-major weight's sums would follow the number of rows inside
    ``batch_invariant``.
    """
    return batch_invariance.asked() and n_in > _C.deepest_alike()


def _quantized_fields(weight: Any, n_in: int, n_out: int) -> tuple[int, ...] | None:
    kind = _INT8
    if isinstance(weight, Dynamic):
        kind, weight = _INT8_DYNAMIC, weight.weight
    if isinstance(weight, Int4Weight):
        kind, groups = _INT4, weight.scale.shape[-1]
        wanted = (
            (weight.values, torch.uint8, n_in // 2),
            (weight.scale, torch.bfloat16, groups),
            (weight.minimum, torch.bfloat16, groups),
        )
        fits = groups > 0 and n_in in (32 * groups, 64 * groups)
    else:
        wanted = ((weight.values, torch.int8, n_in),)  # type: ignore[assignment]
        fits, groups = numbers(weight.scale, torch.float32, n_out) is not None, 0
    for tensor, dtype, columns in wanted:
        fits = fits and readable(tensor, dtype, n_out, columns) and tensor.is_contiguous()
    if not fits or n_in == 0 or _too_deep(n_in):
        return None
    at, scale, *minimum = (tensor.data_ptr() for tensor in weight)
    group = n_in // groups if groups else 0
    return at, n_in, 1, kind, scale, *(minimum or (0,)), group, int(batch_invariance.asked())


def linear_gradient(dweight: Tensor | None, dbias: Tensor | None) -> tuple[int, ...]:
    """struct LinearGradient for gradients made by ``gradient_like``."""
    row, col = (1, 1) if dweight is None else dweight.stride()
    return data(dweight), row, col, data(dbias)


def gradient_like(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty gradient in the layout that autograd wants for this weight, [n_out, n_in]; of the
    weight's dtype if no other is given.
    """
    like = torch.empty_like(weight, dtype=dtype)
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
