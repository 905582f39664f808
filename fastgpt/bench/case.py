"""One piece of work, the peers that do it, and how far each lands from the exact result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fastgpt import torch_state
from fastgpt.bench.errors import (
    Result,
    allowed_error,
    as_tuple,
    largest_error,
    leaves_of,
    outputs_and_gradients,
)
from fastgpt.bench.peers import PEERS

OF_AN_OPERATION = ("reference", "torch", "compile", "fastgpt")
JUDGED = ("fastgpt", "loss")  # by the error rule

Forms = dict[str, Callable[..., Result]]  # an operation on the same inputs, by peer


@dataclass
class Case:
    """`peers[name]()` does the work. It returns what `exact` is, or None if its result cannot be
    compared with that.
    """

    peers: dict[str, Callable[[], Result | None]]
    exact: Result | None  # in float64; None where it would take too much memory
    skipped: dict[str, str] = field(default_factory=dict)  # peers that cannot run here, and why
    base: str = "reference"  # the peer that the others are compared with
    rounds: int | None = None  # at most, where one takes minutes
    _errors: dict[str, dict[str, float]] = field(default_factory=dict)

    @torch.no_grad()
    def errors(self, peer: str) -> dict[str, float]:
        """How far the result of a peer's first, cold call lies from the exact one, by each measure;
        empty if nothing tells.
        """
        if peer not in self._errors:
            got = self.peers[peer]()
            self._errors[peer] = {} if got is None else self.distances(got)
        return self._errors[peer]

    def error(self, peer: str) -> float | None:
        """The largest absolute error of a peer; None if nothing tells."""
        return self.errors(peer).get("error")

    def distances(self, got: Result) -> dict[str, float]:
        """The errors of a result; none without an exact one."""
        return {} if self.exact is None else {"error": largest_error(got, self.exact)}

    def why_not(self, peer: str) -> str | None:
        """Why a peer cannot run on this machine; None if it can."""
        if peer in self.skipped:
            return self.skipped[peer]
        if peer not in self.peers:
            return "does not do this work"
        try:
            self.errors(peer)
        except Exception as error:  # a library of another version than its peer is written for
            if torch_state.is_compile_error(error):
                return "torch.compile finds no C++ compiler"
            if peer == self.base or PEERS[peer].is_ours:
                raise
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        return None

    def fault(self) -> str | None:
        """What is wrong with fastgpt's results by the error rule; None if nothing is."""
        theirs = self.error(self.base)
        if theirs is None or self.exact is None:
            return None
        allowed = allowed_error(theirs, self.exact)
        for peer in JUDGED:
            ours = self.error(peer) if peer in self.peers else None
            if ours is not None and not ours <= allowed:
                return f"{peer} is off by {ours:.2e}, {PEERS[self.base].label} by {theirs:.2e}"
        return None

    def check(self) -> None:
        """Raise AssertionError if there is a fault."""
        fault = self.fault()
        assert fault is None, fault


def forward(forms: Forms, inputs: Sequence[Tensor]) -> Case:
    """The case of an operation's outputs. The first form gives the exact ones in float64."""
    exact = next(iter(forms.values()))(*(t.double() for t in inputs))
    return Case({name: partial(form, *inputs) for name, form in forms.items()}, exact)


def both_ways(forms: Forms, inputs: Sequence[Tensor]) -> Case:
    """The case of an operation's outputs and the gradients of its inputs. The first form gives the
    exact ones in float64.
    """
    first, leaves = next(iter(forms.values())), leaves_of(inputs)
    upstream = [torch.randn(y.shape) for y in as_tuple(first(*inputs))]
    exact = outputs_and_gradients(first, leaves_of(inputs, torch.float64), upstream)

    def run(form: Callable[..., Result]) -> Callable[[], Result]:
        return lambda: outputs_and_gradients(form, leaves, upstream)

    return Case({name: run(form) for name, form in forms.items()}, exact)
