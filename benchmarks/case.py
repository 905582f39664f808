"""One piece of work, the peers that do it, and how far each lands from the exact result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PEERS = ("reference", "torch", "compile", "fastgpt")  # of an operation
ALL_PEERS = ("reference", "torch", "compile", "hf", "ct2", "floor", "fastgpt", "model.loss")

Result = Tensor | tuple[Tensor, ...]


@dataclass
class Case:
    """`peers[name]()` does the work and returns what `exact` is, or None (`floor` only)."""

    peers: dict[str, Callable[[], Result | None]]
    exact: Result | None  # in float64; None where each peer draws masks of its own
    skipped: dict[str, str] = field(default_factory=dict)  # peers that cannot run here, and why
    _errors: dict[str, float | None] = field(default_factory=dict)

    @torch.no_grad()
    def error(self, peer: str) -> float | None:
        """How far a peer's result lies from `exact`, None without one; its first, cold call."""
        if peer not in self._errors:
            got = self.peers[peer]()
            known = got is not None and self.exact is not None
            self._errors[peer] = self.distance(got) if known else None
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
        if ours is None or theirs is None:
            return
        assert ours <= 2 * theirs, f"fastgpt is off by {ours:.2e}, the reference by {theirs:.2e}"


def both_ways(forms: dict[str, Callable[..., Result]], inputs: Sequence[Tensor]) -> Case:
    """A case of forward and backward: the gradients of the inputs by each form of the work, the
    first of which gives the exact ones in float64.
    """
    first = next(iter(forms.values()))
    shapes = first(*inputs)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    upstream = [torch.randn(y.shape) for y in shapes]

    @torch.enable_grad()
    def gradients(form: Callable[..., Result], leaves: Sequence[Tensor]) -> Result:
        outputs = form(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        given = [u.to(y.dtype) for u, y in zip(upstream, outputs, strict=True)]
        return torch.autograd.grad(outputs, leaves, given)

    leaves = [t.clone().requires_grad_() for t in inputs]
    exact = gradients(first, [t.double().requires_grad_() for t in inputs])
    peers = {name: lambda form=form: gradients(form, leaves) for name, form in forms.items()}
    return Case(peers, exact)
