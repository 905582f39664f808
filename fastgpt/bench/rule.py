"""Whether ``auto`` takes what is fastest on this machine, in words for a report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil
from statistics import median
from typing import NamedTuple

import torch

from fastgpt import (
    GPT_CONFIG_124M,
    GPTModel,
    cpu,
    dispatch,
    generate_text_simple,
    reference,
    use_backend,
)
from fastgpt.bench.machine import machine_line
from fastgpt.bench.rounds import Load, doubt_of_load, interleaved

CONFIG = GPT_CONFIG_124M | {"n_layers": 2}  # of the widths that matter
ROUNDS, SECONDS = 7, 10.0  # of each work, as far as the time allows more than one
SLACK = 1.05  # how much slower what is taken may be, since no timing is exact
BOOK, PYTORCH, KERNELS = "the book's model", "PyTorch's own form", "the C++ kernels"


class Rule(NamedTuple):
    """What auto takes on the CPU, why not the C++ kernels, and each work's seconds by peer."""

    taken: str  # PYTORCH or KERNELS
    why: str | None
    seconds: dict[str, dict[str, float]]
    doubt: str | None  # why the seconds cannot be trusted

    def broken(self) -> list[str]:
        """The works in which something else is faster than what auto takes."""
        return [
            work
            for work, seconds in self.seconds.items()
            if seconds[self.taken] > SLACK * min(seconds.values())
        ]

    def lines(self) -> list[str]:
        """The report."""
        peers = list(next(iter(self.seconds.values())))
        table = [("", *peers)]
        for work, seconds in self.seconds.items():
            table.append((work, *(f"{seconds[BOOK] / seconds[peer]:.2f}" for peer in peers)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        rows = [
            "  "
            + row[0].ljust(widths[0])
            + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
            for row in table
        ]
        why = f" ({self.why})" if self.why else ""
        broken = self.broken()
        verdict = (
            f"something else is faster in: {', '.join(broken)}. Please report these lines."
            if broken
            else "nothing here is faster."
        )
        doubt = [f"These figures cannot be trusted: {self.doubt}."] if self.doubt else []
        return [
            "How many times as fast as the book's model, two blocks of GPT-2 124M in float32:",
            *rows,
            f"On the CPU auto takes {self.taken}{why}; {verdict}",
            *doubt,
            machine_line(),
        ]


def check() -> Rule:
    """Times the book's model, and ours by PyTorch's own operations and by the C++ kernels if they
    can run; takes under a minute on most machines.
    """
    torch.manual_seed(123)
    book = reference.GPTModel(CONFIG)
    ours = GPTModel(CONFIG)
    ours.load_state_dict(book.state_dict())
    loops = {BOOK: (book, reference.generate_text_simple), PYTORCH: (ours, generate_text_simple)}
    if cpu.missing_reason() is None:
        loops[KERNELS] = loops[PYTORCH]
    ids = torch.randint(int(CONFIG["vocab_size"]), (1, 128))
    backend = {PYTORCH: "reference", KERNELS: "cpu"}

    def on_backend(peer: str, run: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            with use_backend(backend.get(peer, "auto")):
                run()

        return call

    works = {
        "forward [1, 128]": lambda model, _: torch.no_grad()(model)(ids),
        "training step [1, 128]": lambda model, _: _step(model, ids),
        "generation [1, 32] + 16": lambda model, loop: loop(
            model, ids[:, :32], 16, CONFIG["context_length"]
        ),
    }
    load, seconds = Load(), {}
    for name, work in works.items():
        for model in (book, ours):
            model.train("training" in name)
        runs = {peer: on_backend(peer, partial(work, *how)) for peer, how in loops.items()}
        once = sum(map(sum, interleaved(runs, 1).values()))  # and warms up
        rounds = max(1, min(ROUNDS, ceil(SECONDS / once)))
        seconds[name] = {peer: median(s) for peer, s in interleaved(runs, rounds).items()}
    takes_kernels = dispatch.choose("linear", torch.empty(1)) == "cpu"
    why = None if takes_kernels else cpu.missing_reason() or cpu.passed_over
    return Rule(KERNELS if takes_kernels else PYTORCH, why, seconds, doubt_of_load(load.others()))


def _step(model: torch.nn.Module, ids: torch.Tensor) -> None:
    logits = model(ids)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    model.zero_grad(set_to_none=True)
