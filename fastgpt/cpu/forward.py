"""A whole forward pass in one call into C++, without gradients, from the live parameters.

``Run`` gathers the addresses of what it can take, embeddings, blocks, final norm and head, and
hands them over in one call; where a piece is not plainly one of ours, the caller flushes what has
gathered and runs that piece itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.cpu import _C
from fastgpt.cpu.records import address, threads_for
from fastgpt.cpu.transformer_block import EPS
from fastgpt.cpu.workspace import workspace

_FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults
_NO_LINEAR = (0, 0, 0, 0, 0, 0)


class Run:
    """One forward pass over ids [B, T] that stand behind `past` cached tokens.

    Its residual stream x is its own: what a module made is copied first, what a module gets is
    fresh.
    """

    def __init__(
        self, owner: nn.Module, ids: Tensor, width: int, heads: int, head_dim: int
    ) -> None:
        self.owner, self.ids = owner, ids.contiguous()
        self.width, self.heads, self.head_dim = width, heads, head_dim
        self.past = self.capacity = 0
        self.limit = 0  # the most tokens a cache may hold
        self._x: Tensor | None = None
        self._embeddings: tuple[int, int] | None = None
        self._blocks: list[int] = []
        self._n_blocks = self._hidden = 0

    def embed(self, tables: tuple[int, int]) -> None:
        """Takes the addresses of the token and position embeddings; the ids must be in range."""
        self._embeddings = tables

    def add(self, record: tuple[int, ...], hidden: int, caches: tuple[int, int]) -> None:
        """Takes a block: the fields of struct Block, and the width of its feed-forward's middle."""
        self._blocks += record
        self._blocks += caches
        self._n_blocks += 1
        self._hidden = max(self._hidden, hidden)

    def take_capacity(self, capacity: int) -> None:
        """The caches of one call have one capacity; before another, what has gathered runs."""
        if self._n_blocks and capacity != self.capacity:
            self._x = self.x
        self.capacity = capacity

    def fits(self) -> bool:
        """Whether the stream is as a call expects it; a module may have changed its form."""
        if self._embeddings or self._blocks:
            return True
        return address(self._x, *self.ids.shape, self.width, contiguous=False) is not None

    @property
    def x(self) -> Tensor:
        """The residual stream, [B, T, width], once what has gathered so far has run."""
        if self._embeddings or self._blocks:
            self._call(None, (0, 0), _NO_LINEAR, last_only=False)
        assert self._x is not None
        return self._x

    @x.setter
    def x(self, made_by_a_module: Tensor) -> None:
        self._x = made_by_a_module

    def finish(
        self, norm: tuple[int, int], head: tuple[int, ...] = _NO_LINEAR, last_only: bool = False
    ) -> Tensor:
        """Runs what has gathered, the final norm and the head, if there is one. Returns [B, T or 1,
        n_out or width].
        """
        B, T = self.ids.shape
        n_out = self.width if head is _NO_LINEAR else head[4]
        out = torch.empty(B, 1 if last_only else T, n_out, **_FLOAT32)
        self._call(out, norm, head, last_only)
        return out

    def _call(
        self,
        out: Tensor | None,
        norm: tuple[int, int],
        head: tuple[int, ...],
        last_only: bool,
    ) -> None:
        B, T = self.ids.shape
        x = None
        if self._embeddings is None:
            assert self._x is not None
            x = self._x.clone(memory_format=torch.contiguous_format)
        elif out is None:
            x = torch.empty(B, T, self.width, **_FLOAT32)
        sizes = (
            B,
            T,
            self.past,
            self.capacity,
            self.width,
            self.heads,
            self.head_dim,
            self._hidden,
        )
        ids = (self.ids.data_ptr() if self._embeddings else 0, int(self.ids.dtype is torch.int64))
        at_out = out.data_ptr() if out is not None else 0

        def fields(at_x: int, at_workspace: int) -> list[int]:
            embeddings = self._embeddings or (0, 0)
            rest = (at_out, int(last_only), at_workspace, self._n_blocks)
            return [*sizes, *ids, *embeddings, at_x, *norm, *head, *rest]

        rows = B * T
        work = rows * self.width * (self._n_blocks * (4 * self.width + 2 * self._hidden) + head[4])
        threads = threads_for(work)
        stream = 0 if x is not None else rows * self.width
        with workspace(self.owner, stream + _C.forward_workspace(fields(0, 0), threads)) as start:
            at_x = x.data_ptr() if x is not None else start
            _C.forward(fields(at_x, start + 4 * stream), self._blocks, EPS, threads)
        self._x, self._embeddings, self._blocks, self._n_blocks = x, None, [], 0
