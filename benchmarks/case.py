"""One piece of work, the peers that do it, and how far each lands from the exact result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

PEERS = ("reference", "torch", "compile", "fastgpt")


@dataclass
class Case:
    """`peers[name]()` does the work and returns a tensor or a tuple of them, as `exact` does."""

    peers: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]
    exact: Tensor | tuple[Tensor, ...]  # the result in float64
    _errors: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def error(self, peer: str) -> float:
        """Largest absolute difference of a peer's result from `exact`; its first, cold call too."""
        if peer not in self._errors:
            got, exact = self.peers[peer](), self.exact
            pairs = zip(got, exact, strict=True) if isinstance(exact, tuple) else [(got, exact)]
            self._errors[peer] = max((a - b).abs_().max().item() for a, b in pairs)
        return self._errors[peer]

    def can_run(self, peer: str) -> bool:
        """Whether a peer works on this machine: torch.compile needs a C++ compiler."""
        try:
            self.error(peer)
        except torch._dynamo.exc.TorchDynamoException:
            return False
        return True

    def check(self) -> None:
        """Raise AssertionError if fastgpt errs more than twice as much as the reference."""
        ours, theirs = self.error("fastgpt"), self.error("reference")
        assert ours <= 2 * theirs, f"fastgpt is off by {ours:.2e}, the reference by {theirs:.2e}"
