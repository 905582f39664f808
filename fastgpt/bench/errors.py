"""The error rule: fastgpt may err twice as much as PyTorch at the same dtype, and one rounding.

An error is the largest absolute difference from the exact result, the same work in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TIMES = 2  # as much as PyTorch's own error
POSITIONS = 64  # whose distributions are held at once

Result = Tensor | tuple[Tensor, ...]


def as_tuple(result: Result) -> tuple[Tensor, ...]:
    """The tensors of a result."""
    return result if isinstance(result, tuple) else (result,)


def largest_error(got: Result, exact: Result) -> float:
    """The largest absolute difference between two results; NaN if either has one."""
    pairs = zip(as_tuple(got), as_tuple(exact), strict=True)
    return torch.stack([(a - b).abs_().max().double() for a, b in pairs]).max().item()


def kl_divergence(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """How far the distributions of next tokens lie from the exact ones: the Kullback-Leibler
    divergence's mean and its largest over all positions. Both are logits, [..., V].
    """
    found = []
    for theirs, right in zip(
        got.flatten(0, -2).split(POSITIONS), exact.flatten(0, -2).split(POSITIONS), strict=True
    ):
        p, q = right.double().log_softmax(-1), theirs.double().log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1))
    each = torch.cat(found)
    return each.mean().item(), each.max().item()


def allowed_error(theirs: float, exact: Result, dtype: torch.dtype = torch.float32) -> float:
    """The error that fastgpt may have, where PyTorch's is `theirs`."""
    largest = max(t.abs().max().item() for t in as_tuple(exact))
    return TIMES * theirs + torch.finfo(dtype).eps * largest


@torch.enable_grad()
def outputs_and_gradients(
    f: Callable[..., Result], leaves: Sequence[Tensor], upstream: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """f's outputs and the gradients of its inputs, which require gradients."""
    outputs = as_tuple(f(*leaves))
    given = [u.to(y.dtype) for u, y in zip(upstream, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, given)
    return *(y.detach() for y in outputs), *gradients


def leaves_of(inputs: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies of the inputs that require gradients."""
    return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in inputs]
