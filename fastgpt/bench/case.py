"""One piece of work, the peers that do it, and how far each lands from the exact result.

The peers by name:

- `reference`: the book's code, `fastgpt.reference`; `cached`: the same with a key-value cache;
- `torch`: the same in PyTorch's own fused operations;
- `compile`: the book's code under `torch.compile`;
- `hf`: Hugging Face's GPT-2 with PyTorch's fused attention, where transformers is installed;
- `ct2`: CTranslate2 in float32, where it is installed;
- `products`: no model, only its matrix products by PyTorch's library, into ready buffers;
- `fastgpt`: this package; `loss`: its `model.loss` in place of the logits and their cross entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

PEERS = ("reference", "torch", "compile", "fastgpt")  # of an operation
ALL_PEERS = (
    "reference",
    "cached",
    "torch",
    "compile",
    "hf",
    "ct2",
    "products",
    "fastgpt",
    "loss",
)
OURS = ("fastgpt", "loss")

Result = Tensor | tuple[Tensor, ...]


@dataclass
class Case:
    """`peers[name]()` does the work and returns what `exact` is, or None where that can't be held
    against it.
    """

    peers: dict[str, Callable[[], Result | None]]
    exact: Result | None  # in float64; None where it would take too much memory
    skipped: dict[str, str] = field(default_factory=dict)  # peers that cannot run here, and why
    _errors: dict[str, float | None] = field(default_factory=dict)

    @torch.no_grad()
    def error(self, peer: str) -> float | None:
        """How far a peer's result lies from `exact`, None without one; its first, cold call."""
        if peer not in self._errors:
            got = self.peers[peer]()
            self._errors[peer] = None if got is None else self.distance(got)
        return self._errors[peer]

    def distance(self, got: Result) -> float | None:
        """Largest absolute difference from `exact`."""
        if self.exact is None:
            return None
        pairs = zip(_tuple(got), _tuple(self.exact), strict=True)
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
        except Exception as error:  # a library of another version than its peer is written for
            if peer in ("reference", *OURS):
                raise
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        return None

    def fault(self) -> str | None:
        """In words, if fastgpt errs more than twice as much as the reference, and one rounding."""
        theirs = self.error("reference")
        if theirs is None or self.exact is None:
            return None
        largest = max(t.abs().max().item() for t in _tuple(self.exact))
        allowed = 2 * theirs + torch.finfo(torch.float32).eps * largest
        for peer in OURS:
            ours = self.error(peer) if peer in self.peers else None
            if ours is not None and not ours <= allowed:
                return f"{peer} is off by {ours:.2e}, the reference by {theirs:.2e}"
        return None

    def check(self) -> None:
        """Raise AssertionError if there is a fault."""
        fault = self.fault()
        assert fault is None, fault


def _tuple(result: Result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


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
    return Case({name: partial(gradients, form, leaves) for name, form in forms.items()}, exact)
