"""Scratch memory that is kept from call to call, because a fresh large block costs page faults each
time.

An idle block lies with the model or module that used it last and goes with it; whoever needs one
and has none takes another's, so there are never more than calls at once.

Threads share the dictionary without a lock: each access is one operation of a plain dict or list,
which no other thread and no garbage collection can interrupt, with a GIL or without. A
WeakKeyDictionary is not: it iterates in Python.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from fastgpt.cpu import _C

# From here on glibc's allocator maps every block by itself.
_LARGE = 32 << 20

_idle: dict[weakref.ref[object], list[Tensor]] = {}


class workspace:
    """``with workspace(owner, floats) as address:`` at least so many floats, this call's own.

    Without an owner they go with the call.
    """

    def __init__(self, owner: object | None, floats: int) -> None:
        self.own = [] if owner is None else _idle.setdefault(weakref.ref(owner, _forget), [])
        block = _pop(self.own)
        if block is None and owner is not None:
            for others in list(_idle.values()):
                block = block if block is not None else _pop(others)
        if block is None or block.numel() < floats:
            block = None  # gone before the larger one comes
            block = torch.empty(floats, dtype=torch.float32, device="cpu")
        self.block = block

    def __enter__(self) -> int:
        return self.block.data_ptr()

    def __exit__(self, *error: object) -> None:
        self.own.append(self.block)


def on_large_pages(result: Tensor) -> Tensor:
    """The same result, still to be written: first writes to a large one then cost a third."""
    size = result.numel() * result.element_size()
    if size > _LARGE:
        _C.ask_for_large_pages(result.data_ptr(), size)
    return result


def _forget(
    owner: weakref.ref[object], idle: dict[weakref.ref[object], list[Tensor]] = _idle
) -> None:
    idle.pop(owner, None)


def _pop(blocks: list[Tensor]) -> Tensor | None:
    try:
        return blocks.pop()
    except IndexError:  # none there, or another thread has taken it
        return None
