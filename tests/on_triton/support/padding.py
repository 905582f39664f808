"""Tensors inside larger buffers: inputs in NaN, so that a kernel that reads past its data shows in
its results, and outputs in a number, so that one that writes past it shows in the buffer.
"""

import torch

_AROUND = 64  # elements, so that the data stays 16-byte aligned


class Padding:
    """Makes such tensors, and `check`s in the end that nothing around them was written."""

    def __init__(self):
        self._buffers = []

    def __call__(self, x, past_row=0):
        """A copy of x with NaN (-1 for integers) before it, after it and, where past_row is given,
        in that many elements past each row.
        """
        return self._inside(x, past_row, torch.nan if x.dtype.is_floating_point else -1)

    def empty(self, *shape, dtype=torch.float32, past_row=0):
        """An output full of NaN, with a number around it."""
        return self._inside(torch.full(shape, torch.nan, dtype=dtype), past_row, 77)

    def _inside(self, x, past_row, filling):
        width = x.shape[-1] if x.ndim else 1
        rows = x.numel() // width if width else 0
        pitch = width + past_row
        # Room for a whole row past the last.
        buffer = torch.full((2 * _AROUND + (rows + 1) * pitch,), filling, dtype=x.dtype)
        inside = torch.zeros(buffer.shape, dtype=torch.bool)
        for whole, values in ((buffer, x.reshape(rows, width)), (inside, torch.tensor(True))):
            whole[_AROUND : _AROUND + rows * pitch].view(rows, pitch)[:, :width] = values
        strides = [pitch, 1] if x.ndim > 1 else [1]
        for size in reversed(x.shape[1:-1]):
            strides.insert(0, strides[0] * size)
        self._buffers.append((buffer, ~inside, filling))
        return buffer.as_strided(x.shape, strides[: x.ndim], _AROUND)

    def check(self):
        for buffer, outside, filling in self._buffers:
            around = buffer[outside]
            same = around.isnan() if filling != filling else around == filling
            assert same.all(), f"memory around a tensor of {buffer.numel()} was written"
