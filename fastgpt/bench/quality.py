"""What a precision costs on real text: the perplexity of a small trained model on text that it has
not seen, and how far its distributions of next tokens move.

The text is the help that comes with Python, so nothing is downloaded. Its bytes are the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt import GPTModel
from fastgpt.bench.errors import kl_divergence
from fastgpt.bench.narrow import narrowed

CFG: dict[str, Any] = {
    "vocab_size": 256,
    "context_length": 128,
    "emb_dim": 256,
    "n_heads": 4,
    "n_layers": 4,
    "drop_rate": 0.0,
    "qkv_bias": False,
}
STEPS, BATCH, RATE = 300, 16, 1e-3
HELD_OUT = 64  # windows of the text's end


def help_text() -> Tensor:
    """The tokens of Python's help, in windows of a context and the token after it: [N, T + 1]."""
    from pydoc_data.topics import topics

    text = torch.tensor(list("\n".join(topics.values()).encode()))
    return text.unfold(0, CFG["context_length"] + 1, CFG["context_length"])


@torch.enable_grad()
def trained(windows: Tensor, steps: int) -> GPTModel:
    """A model of CFG in eval mode, after some steps of AdamW on random windows, [N, T + 1]."""
    torch.manual_seed(123)
    model = GPTModel(CFG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (BATCH,))]
        optimizer.zero_grad()
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
    return model.eval()


def quality(precisions: Sequence[str]) -> list[dict[str, Any]]:
    """For float32 and each of these precisions the perplexity on held-out text, its change as a
    share of float32's, and the mean and the largest KL divergence from float32's distributions.
    """
    windows = help_text()
    return compared(trained(windows[:-HELD_OUT], STEPS), windows[-HELD_OUT:], precisions)


@torch.no_grad()
def compared(model: GPTModel, windows: Tensor, precisions: Sequence[str]) -> list[dict[str, Any]]:
    """`quality` of a model on windows of text, [N, T + 1]."""
    ids, targets = windows[:, :-1], windows[:, 1:].flatten()
    exact = model(ids)
    rows: list[dict[str, Any]] = []
    for precision in ("float32", *precisions):
        logits = exact if precision == "float32" else narrowed(model, precision)(ids)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), targets)
        perplexity = loss.exp().item()
        mean, largest = kl_divergence(logits, exact)
        row = {"precision": precision, "perplexity": perplexity}
        row["change"] = perplexity / rows[0]["perplexity"] - 1 if rows else 0.0
        rows.append(row | {"kl_mean": mean, "kl_largest": largest})
    return rows
