"""Tensors inside of larger blocks: what lies around them is NaN, and must stay as it is."""

import math
from typing import NamedTuple

import torch

# NaN in every floating dtype; in a wide integer no id of any vocabulary.
_POISON = 0x7FFD7FFD
_BYTES = 256  # on either side: four of the widest vectors, so tensors stay aligned as torch's are
_ALL = 1 << 15  # words up to which a fresh tensor is poisoned inside too
_AROUND = torch.full((_BYTES // 4,), _POISON, dtype=torch.int32)


class Layout(NamedTuple):
    """How a tensor lies in memory."""

    order: int = 0  # of the dimensions: as many steps of rotation
    steps: tuple[int, ...] = ()  # between neighbours, by dimension; 1 where none is given
    offset: int = 0  # elements between the guard and the first one
    expanded: int = -1  # the dimension along which all elements are one, if it exists


class Guards:
    """The blocks of one example."""

    def __init__(self, monkeypatch):
        self.inputs, self.made = [], []
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch.Tensor, "new_empty"),
        ):
            monkeypatch.setattr(owner, name, self._guarding(getattr(owner, name)))

    def _guarding(self, original):
        def make(*args, **kwargs):
            made = original(*args, **kwargs)
            plain = type(made) is torch.Tensor and made.layout is torch.strided and made.is_cpu
            return self._around(made) if plain else made

        return make

    def _around(self, made):
        """The tensor, with another storage. Not a view, so that autograd may hand it out."""
        words = -(-_extent(made.shape, made.stride()) * made.element_size() // 4)
        total = words + 2 * len(_AROUND)
        if total <= _ALL:
            block = torch.full((total,), _POISON, dtype=torch.int32)
        else:
            block = torch.zeros(total, dtype=torch.int32)
            block[: len(_AROUND)] = block[-len(_AROUND) :] = _AROUND
        self.made.append(block)
        start = _BYTES // made.element_size()
        return made.set_(block.untyped_storage(), start, made.shape, made.stride())

    def place(self, values, layout=None):
        """The values in such a layout; expanded, those of the first along that dimension."""
        layout = layout or Layout()
        shape, dims, expanded = values.shape, values.dim(), layout.expanded
        if not 0 <= expanded < dims or shape[expanded] == 0:
            expanded = -1
        else:
            values = values.narrow(expanded, 0, 1)
        strides, step = [1] * dims, 1
        for i in range(dims):
            dim = (dims - 1 - i - layout.order) % dims
            step *= layout.steps[dim] if dim < len(layout.steps) else 1
            strides[dim] = step
            step *= max(1, values.shape[dim])
        size = values.element_size()
        words = -(-(_extent(values.shape, strides) + layout.offset) * size // 4)
        block = torch.full((words + 2 * len(_AROUND),), _POISON, dtype=torch.int32)
        flat, start = block.view(values.dtype), _BYTES // size + layout.offset
        flat.as_strided(values.shape, strides, start).copy_(values)
        self.inputs.append((block, block.clone()))
        if expanded >= 0:
            strides[expanded] = 0
        return flat.as_strided(shape, strides, start)

    def check(self, what):
        """Nothing was written to an input, nor around anything."""
        for block, before in self.inputs:
            assert torch.equal(block, before), f"{what}: an input, or memory around it, has changed"
        for block in self.made:
            same = torch.equal(block[: len(_AROUND)], _AROUND)
            assert same, f"{what}: something was written in front of a result or workspace"
            same = torch.equal(block[-len(_AROUND) :], _AROUND)
            assert same, f"{what}: something was written behind a result or workspace"
        self.made.clear()

    def clear(self):
        self.inputs.clear()
        self.made.clear()


def _extent(shape, strides):
    """How many elements there are from the first to the last."""
    if math.prod(shape) == 0:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
