"""Ids on a GPU, compared with the vocabulary there.

To read the answer at once is to wait for all that was queued before it, so that the GPU then runs
dry. A training step leaves it in pinned memory instead, and the next one reads it.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.config import check_range
from fastgpt.ops.later import Later


class _Check(NamedTuple):
    thread: threading.Thread  # in which a wrong id is raised
    device: torch.device
    name: str
    vocab_size: int
    extremes: Later  # the least and the greatest id


_checks: list[_Check] = []  # that nobody has read yet: of a thread one a name and device
_lock = threading.Lock()


def check_on_gpu(
    ids: Tensor, vocab_size: int, name: str = "token id", ignore_index: int | None = None
) -> None:
    """Compares ids on a GPU, which ``dispatch.readable`` allows, with the vocabulary; waits for
    the answer only if gradients are off. Else ``raise_wrong_ids`` has it, or the next check of this
    name in this thread.

    Args:
        ids: any shape and integer dtype that torch compares.
        name: what the message calls them.
        ignore_index: stands for no id.

    Raises:
        IndexError: one is outside the vocabulary, or one of this thread's was before; the message
            names it.
    """
    _raise_read(ids.device, threading.current_thread(), lambda check: check.name == name)
    if ids.numel() == 0:
        return
    if ignore_index is not None:
        ids = ids.masked_fill(ids == ignore_index, 0)
    extremes = Later(torch.stack(torch.aminmax(ids)))
    check = _Check(threading.current_thread(), ids.device, name, vocab_size, extremes)
    with _lock:
        _checks.append(check)
    if not torch.is_grad_enabled():
        raise_wrong_ids(ids)


def raise_wrong_ids(x: Tensor, thread: threading.Thread | None = None, wait: bool = True) -> None:
    """Reads what checks on x's device have found; does nothing on a CPU or in a captured graph.

    Args:
        thread: whose checks; by default this one's. Those of ended threads belong to everybody.
        wait: for those that the GPU has not come to.

    Raises:
        IndexError: an id was outside the vocabulary; the message names it. It is raised once.
    """
    if x.is_cuda and dispatch.readable(x):
        _raise_read(x.device, thread or threading.current_thread(), lambda check: wait)


def _raise_read(device, thread, waits):
    """Raises what the thread's checks found, of those that are done or to be waited for."""

    def due(check):
        its = check.thread is thread or not check.thread.is_alive()
        return its and check.device == device and (waits(check) or check.extremes.there())

    with _lock:
        read = [check for check in _checks if due(check)]
        for check in read:
            _checks.remove(check)
    for check in read:
        low, high = check.extremes.read()
        check_range(check.name, low, high, check.vocab_size)
