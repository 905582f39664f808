"""Tensors inside larger buffers of NaN, so that a kernel that reads past its data shows in its
results, and one that writes past it in the buffer.
"""

import torch

_BEFORE = 64  # elements, so that the data stays 16-byte aligned


def _filling(dtype):
    return torch.nan if dtype.is_floating_point else -1


class Padding:
    """Makes such tensors, and `check`s in the end that nothing around them was written."""

    def __init__(self):
        self._buffers = []

    def __call__(self, x, past_row=0):
        """A copy of x with NaN (-1 for integers) before it, after it and, where past_row is given,
        in that many elements past each row.
        """
        width = x.shape[-1] if x.ndim else 1
        rows = x.numel() // width if width else 0
        pitch = width + past_row
        buffer = torch.full((2 * _BEFORE + rows * pitch + width,), _filling(x.dtype), dtype=x.dtype)
        inside = torch.zeros(buffer.shape, dtype=torch.bool)
        for whole in (inside, buffer):
            whole[_BEFORE : _BEFORE + rows * pitch].view(rows, pitch)[:, :width] = (
                True if whole is inside else x.reshape(rows, width)
            )
        strides = [pitch, 1] if x.ndim > 1 else [1]
        for size in reversed(x.shape[1:-1]):
            strides.insert(0, strides[0] * size)
        self._buffers.append((buffer, ~inside))
        return buffer.as_strided(x.shape, strides[: x.ndim], _BEFORE)

    def empty(self, *shape, dtype=torch.float32, past_row=0):
        """An output filled with NaN, inside such a buffer."""
        return self(torch.full(shape, _filling(dtype), dtype=dtype), past_row)

    def check(self):
        for buffer, outside in self._buffers:
            around = buffer[outside]
            untouched = around.isnan() if around.is_floating_point() else around == -1
            assert untouched.all(), f"memory around a tensor of {buffer.numel()} was written"
