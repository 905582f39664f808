"""One piece of work, the peers that do it, and how far each lands from the exact result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

PEERS = ("reference", "torch", "compile", "fastgpt")  # of an operation
ALL_PEERS = ("reference", "torch", "compile", "hf", "ct2", "floor", "fastgpt")

Result = Tensor | tuple[Tensor, ...]


@dataclass
class Case:
    """`peers[name]()` does the work and returns what `exact` is, or None (`floor` only)."""

    peers: dict[str, Callable[[], Result | None]]
    exact: Result  # in float64
    skipped: dict[str, str] = field(default_factory=dict)  # peers that cannot run here, and why
    _errors: dict[str, float | None] = field(default_factory=dict)

    @torch.no_grad()
    def error(self, peer: str) -> float | None:
        """How far a peer's result lies from `exact`, None without one; its first, cold call."""
        if peer not in self._errors:
            got = self.peers[peer]()
            self._errors[peer] = None if got is None else self.distance(got)
        return self._errors[peer]

    def distance(self, got: Result) -> float:
        """Largest absolute difference from `exact`."""
        pairs = zip(got, self.exact, strict=True) if isinstance(got, tuple) else [(got, self.exact)]
        return max((a - b).abs_().max().item() for a, b in pairs)

    def why_not(self, peer: str) -> str | None:
        """Why a peer cannot run on this machine; None where it can."""
        if peer in self.skipped:
            return self.skipped[peer]
        if peer not in self.peers:
            return "no peer of this work"
        try:
            self.error(peer)
        except torch._dynamo.exc.TorchDynamoException:
            return "torch.compile finds no C++ compiler"
        return None

    def check(self) -> None:
        """Raise AssertionError if fastgpt errs more than twice as much as the reference."""
        ours, theirs = self.error("fastgpt"), self.error("reference")
        assert ours <= 2 * theirs, f"fastgpt is off by {ours:.2e}, the reference by {theirs:.2e}"
