"""The cases of the whole model, each with its own way to tell how far a result lies from the exact
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgpt.bench.case import Case
from fastgpt.bench.errors import Result, as_tuple, kl_divergence

if TYPE_CHECKING:
    from fastgpt.bench.workloads import Models

TIE = 1e-4  # logits this close may change places in float32


class Forward(Case):
    """A forward pass: its logits are also judged by the distributions of next tokens."""

    def distances(self, got: Result) -> dict[str, float]:
        """The largest error of a logit, and the mean and the largest KL divergence."""
        assert isinstance(got, Tensor)
        assert isinstance(self.exact, Tensor)
        mean, largest = kl_divergence(got, self.exact)
        return super().distances(got) | {"kl_mean": mean, "kl_largest": largest}


class Training(Case):
    """A training step: timed with the config's dropout, its errors measured without."""

    def __init__(self, *args: Any, models: Models) -> None:
        super().__init__(*args)
        self.models = models

    def errors(self, peer: str) -> dict[str, float]:
        self.models.train(False)
        errors = super().errors(peer)
        self.models.train(True)
        return errors


class Scores(Case):
    """The scores of many texts, of which the first are judged."""

    def distances(self, got: Result) -> dict[str, float]:
        """The largest error of a log-probability."""
        assert self.exact is not None
        return super().distances(as_tuple(got)[: len(self.exact)])


class Generation(Case):
    """Greedy tokens: the model in float64 judges them, fed those very tokens."""

    def __init__(self, *args: Any, models: Models, prompts: Sequence[Tensor]) -> None:
        super().__init__(*args)
        self.models, self.prompts = models, prompts
        self.judged: dict[tuple[int, ...], float] = {}

    def distances(self, got: Result) -> dict[str, float]:
        """The most by which a chosen token's logit lies below the greatest of its step."""
        texts = got.unbind() if isinstance(got, Tensor) else got
        with self.models.in_float64():
            pairs = zip(self.prompts, texts, strict=True)
            return {"error": max(self._behind(prompt, text) for prompt, text in pairs)}

    def _behind(self, prompt: Tensor, text: Tensor) -> float:
        start, key = len(prompt), tuple(text.tolist())
        assert torch.equal(text[:start], prompt)
        if key not in self.judged:
            logits = self.models.book(text[None, :-1])[0, start - 1 :]
            chosen = logits.gather(-1, text[start:, None])[:, 0]
            self.judged[key] = (logits.amax(-1) - chosen).max().item()
        return self.judged[key]

    def fault(self) -> str | None:
        """What is wrong if fastgpt chose a token that is not the likeliest; None if it did not."""
        ours = self.error("fastgpt")
        if ours is None or ours <= TIE:
            return None
        return f"fastgpt chose a token whose logit is {ours:.2e} below the greatest"
