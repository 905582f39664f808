"""The time of each operation, ours and its peers', and its share of the machine's limits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import Bench
from benchmarks.gpu.operations import FULL, TIMED, TINY, Function, Work, build
from fastgpt.bench.bound import least_seconds
from fastgpt.bench.errors import as_tuple

Row = dict[str, Any]


def _peer_backward(work: Work, peer: Function) -> Callable[[], Any]:
    """A peer's gradients: of a graph that is made once, or each time if the work is whole."""
    leaves = [t.detach().requires_grad_() for t in work.inputs]

    def graph() -> tuple[Tensor, ...]:
        return as_tuple(peer(*leaves))

    def gradients(results: tuple[Tensor, ...], keep: bool) -> Any:
        if results[0].dim() == 0:  # a loss already summed
            return torch.autograd.grad(results, leaves, retain_graph=keep)
        up = [u.to(r.dtype) for u, r in zip(work.upstream, results, strict=True)]
        return torch.autograd.grad(results, leaves, up, retain_graph=keep)

    if work.whole:
        return lambda: gradients(graph(), False)
    results = graph()
    return lambda: gradients(results, True)


def _share(bench: Bench, work: Work, backward: bool, seconds: float) -> Row:
    moved, operations = work.moved[backward], work.operations[backward]
    least = least_seconds(bench.peaks, operations, moved)
    return {"seconds": seconds, "share_of_limit": least / seconds if least else None}


def operations(bench: Bench) -> Iterator[Row]:
    """A row for each operation, pass and peer, in bfloat16."""
    for name in TIMED:
        row = {"operation": name, "dtype": "bfloat16"}
        scale, made = TINY if bench.dry else FULL, []
        work = partial(build, name, scale, torch.bfloat16, bench.device)
        failed = bench.attempt(row, lambda w=work, m=made: m.append(w()) or {})
        if made:
            yield from _passes(bench, row, made.pop())
        else:
            yield failed
        if not bench.dry:
            with contextlib.suppress(RuntimeError):  # if the GPU has failed, each row says so
                torch.cuda.empty_cache()


def _passes(bench: Bench, row: Row, work: Work) -> Iterator[Row]:
    """The forward pass of ours and of each peer, then the backward passes."""

    def time(backward: bool, make: Callable[[], Callable[[], Any]]) -> Row:
        with torch.set_grad_enabled(backward):
            return _share(bench, work, backward, bench.seconds(make()))

    passes = ["forward"] if work.backward is None else ["forward", "backward"]
    if work.whole:
        passes = ["forward and backward"]
    for name in passes:
        backward = name != "forward"
        ours = work.backward if backward else work.forward
        label = row | {"pass": name}
        yield bench.attempt(label | {"peer": "fastgpt"}, partial(time, backward, lambda f=ours: f))
        for peer, function in work.peers.items():
            make = partial(_peer_backward, work, function) if backward else None
            make = make or (lambda f=function: partial(f, *work.inputs))
            yield bench.attempt(label | {"peer": peer}, partial(time, backward, make))
