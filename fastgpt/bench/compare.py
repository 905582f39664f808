"""The book's model and the fused one side by side: the measurement behind `fastgpt compare`.

Both hold the same random weights in one process and take turns. Their logits may differ by as much
as the error rule allows: the book's own largest error, measured in float64, and fastgpt's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fastgpt import GPT_CONFIG_124M, generate_text_simple, reference
from fastgpt.bench.errors import TIMES, largest_error
from fastgpt.bench.rounds import steady_rounds
from fastgpt.bench.workloads import Models

PROMPT = "The cat sat"
PROMPT_IDS = (464, 3797, 3332)  # PROMPT in the gpt2 encoding

ERRORS_APART = 1 + TIMES  # the book's own error once, and fastgpt's

Row = dict[str, Any]


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

    Each row has the `work`, its `tokens` (computed or new), both models' median seconds and tokens
    per second, the `speed_up`, the number of `rounds`, a `doubt` if the times cannot be trusted,
    the `tolerance` and whether the models `agree`. The logits have a `max_abs_difference`, the
    greedy tokens a number of `same_tokens` before the first that differs; the other one is None.
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

    def measured(
        work: str,
        tokens: int,
        runs: Mapping[str, Callable[[], Tensor]],
        verdict: Callable[[Tensor, Tensor], Row],
    ) -> Row:
        step(work)
        found = verdict(runs["reference"](), runs["fastgpt"]())
        taken = steady_rounds(runs, rounds, lambda: step(work), step.once_more)
        apart = "; ".join(f"{name}: {why}" for name in runs if (why := taken.doubt_of(name)))
        row: Row = {"work": work, "tokens": tokens}
        for name in runs:
            row[f"{name}_seconds"] = taken.median(name)
            row[f"{name}_tokens_per_second"] = tokens / taken.median(name)
        row["speed_up"] = row["reference_seconds"] / row["fastgpt_seconds"]
        row["rounds"] = len(taken.seconds["reference"])
        return row | {"doubt": taken.doubt() or apart or None} | found

    rows = []
    for length in lengths:
        # Causal: the first tokens of a longer row have the logits of the shorter one.
        fed, right = ids[:, :length], exact[:, :length]
        runs = {"reference": partial(book, fed), "fastgpt": partial(fused, fed)}
        rows.append(measured(f"forward [1, {length}]", length, runs, partial(_logits, right)))
    del exact, right
    tolerance = max(row["tolerance"] for row in rows)
    loop = (start[None], new_tokens, cfg["context_length"])
    loops = {
        "reference": lambda: reference.generate_text_simple(book, *loop),
        "fastgpt": lambda: generate_text_simple(fused, *loop),
    }

    def tokens(theirs: Tensor, ours: Tensor) -> Row:
        same, agree = _same_tokens(book, theirs, ours, len(start), tolerance)
        return _verdict(None, tolerance, same, agree)

    rows.append(measured(f"{new_tokens} greedy tokens", new_tokens, loops, tokens))
    step("done")
    return rows


def _logits(exact: Tensor, theirs: Tensor, ours: Tensor) -> Row:
    tolerance = ERRORS_APART * largest_error(theirs, exact)
    difference = largest_error(ours, theirs)
    return _verdict(difference, tolerance, None, difference <= tolerance)


def _verdict(difference: float | None, tolerance: float, same: int | None, agree: bool) -> Row:
    return {
        "max_abs_difference": difference,
        "tolerance": tolerance,
        "same_tokens": same,
        "agree": agree,
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
