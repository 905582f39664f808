"""Scratch memory that is kept from call to call, because a fresh large block costs page faults each
time.

An idle block lies with the model or module that used it last and goes with it; whoever needs one
and has none takes another's, so there are never more than calls at once.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

_idle: weakref.WeakKeyDictionary[object, list[Tensor]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def workspace(owner: object | None, floats: int) -> Iterator[int]:
    """The address of at least so many floats, this call's own; without an owner they go with it."""
    own = [] if owner is None else _idle.setdefault(owner, [])
    block = torch.empty(0, dtype=torch.float32, device="cpu")
    for blocks in (own, *_idle.values()) if owner is not None else ():
        with contextlib.suppress(IndexError):  # none there, or another thread has taken it
            block = blocks.pop()
            break
    if block.numel() < floats:
        del block  # before the larger one comes
        block = torch.empty(floats, dtype=torch.float32, device="cpu")
    yield block.data_ptr()
    own.append(block)
