"""fastgpt's own precisions below float32."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fastgpt import GPTModel, generate_text_simple, quantize


def narrowed(model: GPTModel, precision: str) -> GPTModel:
    """A copy of a model in bfloat16, or quantised; the model is left as it is."""
    if precision == "bfloat16":
        return copy.deepcopy(model).to(torch.bfloat16)
    return quantize(model, precision)


class Narrow:
    """A copy of a model at a precision of `fastgpt.bench.peers.PRECISIONS`."""

    def __init__(self, model: GPTModel, precision: str) -> None:
        self.model = narrowed(model, precision).eval()

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [B, T]. Returns the logits, [B, T, V]."""
        logits: Tensor = self.model(ids)
        return logits

    def generate(self, ids: Tensor, max_new_tokens: int) -> Tensor:
        """ids: [B, T]. Returns [B, T + max_new_tokens], which must fit the context."""
        return generate_text_simple(
            self.model, ids, max_new_tokens, self.model.cfg["context_length"]
        )
