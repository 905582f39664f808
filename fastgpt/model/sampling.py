"""From logits to tokens: the likeliest, or drawn as in the book's chapter 5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Logits [B, V], and a generator for each row or none for torch's -> tokens [B, 1].
Choose = Callable[..., Tensor]

# Divided by less, two logits that differ are never both drawn, and large ones overflow.
GREEDY_BELOW = 1e-30


def sampler(temperature: float, top_k: int | None, top_p: float | None) -> Choose:
    """How tokens are chosen under these settings, which ``generate`` explains.

    Raises:
        ValueError: temperature is negative or NaN, top_k below 1 or top_p outside (0, 1].
    """
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature} is not 0 or above")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} is below 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is not above 0 and at most 1")
    return likeliest if temperature < GREEDY_BELOW else Sampler(temperature, top_k, top_p)


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn. Equal ones draw alike, so a graph of one serves the other."""

    temperature: float
    top_k: int | None
    top_p: float | None

    def __call__(
        self, logits: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """[B, V] -> [B, 1]."""
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.top_k is not None:
            least = torch.topk(logits, min(self.top_k, logits.shape[-1])).values.narrow(-1, -1, 1)
            scaled.masked_fill_(logits < least, -torch.inf)
        probabilities = torch.softmax(scaled, dim=-1)
        if self.top_p is not None:
            probabilities = _likeliest_that_reach(self.top_p, probabilities)
        return drawn(probabilities, generators)


def likeliest(logits: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """[B, V] -> [B, 1]; nothing is drawn."""
    return logits.argmax(dim=-1, keepdim=True)


def drawn(probabilities: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """[B, V] -> one token of each row, [B, 1], the one that ``torch.multinomial`` draws.

    It computes the same, after checks that are most of its kernels. One NaN makes a row of softmax
    NaN, so the first column tells; on a GPU it would have to be waited for.

    Raises:
        RuntimeError: a probability on the CPU is NaN.
    """
    if probabilities.device.type == "cpu" and probabilities[:, :1].isnan().any():
        raise RuntimeError("no token can be drawn: a logit of the model is NaN or infinite")
    waiting = torch.empty_like(probabilities)
    if generators is None:
        waiting.exponential_()
    else:
        for row, generator in zip(waiting, generators, strict=True):
            row.exponential_(generator=generator)
    return likeliest(torch.div(probabilities, waiting, out=waiting))


def _likeliest_that_reach(top_p: float, probabilities: Tensor) -> Tensor:
    """[B, V] -> the same with the tokens behind the first that reach top_p at 0."""
    values, order = probabilities.sort(dim=-1, descending=True)
    behind = values.cumsum(dim=-1) - values >= top_p
    behind.select(-1, 0).fill_(False)  # even where top_p is 0 in their dtype
    return probabilities.masked_fill(behind.scatter(-1, order, behind), 0)
