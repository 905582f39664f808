"""The book's model and the fused one side by side: the measurement behind `fastgpt compare`.

Both hold the same random weights in one process and take turns. The logits of both may differ by as
much as the error rule allows: the book's own largest error, measured in float64, and twice that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fastgpt import GPT_CONFIG_124M, generate_text_simple, reference
from fastgpt.bench.errors import TIMES, largest_error
from fastgpt.bench.rounds import Peers, steady_rounds
from fastgpt.bench.workloads import Models

PROMPT = "The cat sat"
PROMPT_IDS = (464, 3797, 3332)  # PROMPT in the gpt2 encoding

ERRORS_APART = 1 + TIMES  # the book's own error once, and fastgpt's


@dataclass(frozen=True)
class Row:
    """One piece of work, done by both models."""

    work: str
    tokens: int  # computed (forward) or new (greedy)
    reference_seconds: float  # median over the rounds
    fastgpt_seconds: float
    rounds: int
    doubt: str | None  # why the times cannot be trusted; None if they can
    max_abs_difference: float | None  # between the logits; None for greedy tokens
    tolerance: float
    same_tokens: int | None  # how many greedy tokens agree before the first that differs
    agree: bool

    @property
    def reference_tokens_per_second(self) -> float:
        return self.tokens / self.reference_seconds

    @property
    def fastgpt_tokens_per_second(self) -> float:
        return self.tokens / self.fastgpt_seconds

    @property
    def speed_up(self) -> float:
        return self.reference_seconds / self.fastgpt_seconds

    def as_dict(self) -> dict[str, Any]:
        """Every field and every figure derived from them."""
        derived = ("reference_tokens_per_second", "fastgpt_tokens_per_second", "speed_up")
        return asdict(self) | {name: getattr(self, name) for name in derived}


class Steps:
    """Counts the steps of a comparison; called with the next step."""

    def __init__(
        self, total: int, rounds: int, progress: Callable[[int, int, str], object]
    ) -> None:
        self._done, self._total, self._rounds, self._progress = 0, total, rounds, progress

    def __call__(self, doing: str) -> None:
        self._progress(self._done, self._total, doing)
        self._done += 1

    def once_more(self) -> None:
        """The rounds of a piece of work are repeated."""
        self._total += self._rounds


@torch.no_grad()
def compare(
    prompt: Sequence[int] = PROMPT_IDS,
    cfg: dict[str, Any] = GPT_CONFIG_124M,
    *,
    seed: int = 123,
    rounds: int = 5,
    lengths: Sequence[int] = (256, 1024),
    new_tokens: int = 32,
    progress: Callable[[int, int, str], object] = lambda done, total, doing: None,
) -> list[Row]:
    """Time `fastgpt.GPTModel` against `fastgpt.reference.GPTModel` and compare what they return.

    One row for a forward pass at [1, T] for each T of `lengths`, on `prompt` followed by random
    ids, then one for `new_tokens` greedy tokens after `prompt`. `progress(done, total, doing)` is
    called before each step. The fused model runs on the current backend.
    """
    step = Steps(2 + (len(lengths) + 1) * (rounds + 1), rounds, progress)
    step("building both models")
    models = Models(cfg, seed=seed)
    book, fused = models.book, models.fused
    start = torch.tensor(prompt)
    ids = torch.cat([start, torch.randint(cfg["vocab_size"], (max(lengths) - len(start),))])[None]

    step("the reference in float64")
    with models.in_float64():
        exact = book(ids)

    rows = []
    for length in lengths:
        # Causal: the first tokens of a longer row have the logits of the shorter one.
        rows.append(_forward(book, fused, ids[:, :length], exact[:, :length], rounds, step))
    del exact
    tolerance = max(row.tolerance for row in rows)
    context_size = cfg["context_length"]
    rows.append(
        _greedy(book, fused, start[None], new_tokens, context_size, tolerance, rounds, step)
    )
    step("done")
    return rows


def _forward(
    book: Module, fused: Module, ids: Tensor, exact: Tensor, rounds: int, step: Steps
) -> Row:
    work = f"forward {list(ids.shape)}"
    step(work)
    peers: Peers = {"reference": lambda: book(ids), "fastgpt": lambda: fused(ids)}
    theirs, ours = book(ids), fused(ids)
    tolerance = ERRORS_APART * largest_error(theirs, exact)
    difference = largest_error(ours, theirs)
    del theirs, ours
    return Row(
        work=work,
        tokens=ids.numel(),
        **_timed(work, peers, rounds, step),
        max_abs_difference=difference,
        tolerance=tolerance,
        same_tokens=None,
        agree=difference <= tolerance,
    )


def _greedy(
    book: Module,
    fused: Module,
    start: Tensor,
    new_tokens: int,
    context_size: int,
    tolerance: float,
    rounds: int,
    step: Steps,
) -> Row:
    work = f"{new_tokens} greedy tokens"
    step(work)
    peers = {
        "reference": lambda: reference.generate_text_simple(book, start, new_tokens, context_size),
        "fastgpt": lambda: generate_text_simple(fused, start, new_tokens, context_size),
    }
    theirs, ours = peers["reference"](), peers["fastgpt"]()
    same_tokens, agree = _same_tokens(book, theirs, ours, start.shape[1], tolerance)
    return Row(
        work=work,
        tokens=new_tokens,
        **_timed(work, peers, rounds, step),
        max_abs_difference=None,
        tolerance=tolerance,
        same_tokens=same_tokens,
        agree=agree,
    )


def _timed(work: str, peers: Peers, rounds: int, step: Steps) -> dict[str, Any]:
    """The fields of a row that come from timing both models."""
    taken = steady_rounds(peers, rounds, lambda: step(work), step.once_more)
    apart = "; ".join(f"{name}: {why}" for name in peers if (why := taken.doubt_of(name)))
    return {
        "reference_seconds": taken.median("reference"),
        "fastgpt_seconds": taken.median("fastgpt"),
        "rounds": len(taken.seconds["reference"]),
        "doubt": taken.doubt() or apart or None,
    }


def _same_tokens(
    book: Module, theirs: Tensor, ours: Tensor, prompt: int, tolerance: float
) -> tuple[int, bool]:
    """Count the new tokens before the first difference, and say whether the two rows agree.

    They agree if all are the same, or if they part at a tie: each logit may be off by `tolerance`,
    so two logits within twice that may change places.
    """
    different = (theirs != ours).flatten().nonzero()
    if not len(different):
        return theirs.shape[1] - prompt, True
    first = int(different[0])
    logits = book(theirs[:, :first])[0, -1]
    gap = (logits[theirs[0, first]] - logits[ours[0, first]]).item()
    return first - prompt, gap <= 2 * tolerance
