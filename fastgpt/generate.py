"""Generation of text, token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def generate_text_simple(
    model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int
) -> Tensor:
    """Greedy decoding: appends the likeliest next token, max_new_tokens times.

    Args:
        model: any module from ids [B, T] to logits [B, T, vocab_size]; its train or eval mode stays
            as it is.
        idx: [B, T] token ids.
        max_new_tokens: how many tokens to append.
        context_size: how many of the last tokens the model sees.

    Returns:
        [B, T + max_new_tokens] token ids.
    """
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(idx[:, -context_size:])
        idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return idx
