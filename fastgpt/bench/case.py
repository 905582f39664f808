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

from fastgpt.bench.errors import (
    Result,
    allowed_error,
    as_tuple,
    largest_error,
    leaves_of,
    outputs_and_gradients,
)

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

Forms = dict[str, Callable[..., Result]]  # an operation on the same inputs, by peer


@dataclass
class Case:
    """`peers[name]()` does the work. It returns what `exact` is, or None if its result cannot be
    compared with that.
    """

    peers: dict[str, Callable[[], Result | None]]
    exact: Result | None  # in float64; None where it would take too much memory
    skipped: dict[str, str] = field(default_factory=dict)  # peers that cannot run here, and why
    _errors: dict[str, float | None] = field(default_factory=dict)

    @torch.no_grad()
    def error(self, peer: str) -> float | None:
        """The largest error of a peer's first, cold call; None if nothing tells."""
        if peer not in self._errors:
            got = self.peers[peer]()
            self._errors[peer] = None if got is None else self.distance(got)
        return self._errors[peer]

    def distance(self, got: Result) -> float | None:
        """How far a result lies from the exact one; None without an exact one."""
        return None if self.exact is None else largest_error(got, self.exact)

    def why_not(self, peer: str) -> str | None:
        """Why a peer cannot run on this machine; None if it can."""
        if peer in self.skipped:
            return self.skipped[peer]
        if peer not in self.peers:
            return "does not do this work"
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
        """What is wrong with fastgpt's results by the error rule; None if nothing is."""
        theirs = self.error("reference")
        if theirs is None or self.exact is None:
            return None
        allowed = allowed_error(theirs, self.exact)
        for peer in OURS:
            ours = self.error(peer) if peer in self.peers else None
            if ours is not None and not ours <= allowed:
                return f"{peer} is off by {ours:.2e}, the reference by {theirs:.2e}"
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
