"""The book's model with a key-value cache that grows by `torch.cat`, as in the book's package.

That package's own cached GPT-2 (llms-from-scratch 1.0.19) is not a peer: its generate never fills
the cache, so each new token sees only itself, and with `use_cache=True` its mask has a wrong shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt.reference import causal_attention


class CachedBook:
    """Greedy generation by the modules of a `fastgpt.reference.GPTModel`, each token fed once."""

    def __init__(self, book: Any) -> None:
        self.book = book

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int) -> Tensor:
        """ids: [B, T]. Returns [B, T + max_new_tokens], which must fit the context."""
        caches: list[list[Tensor]] = [[] for _ in self.book.trf_blocks]
        unseen = ids
        for _ in range(max_new_tokens):
            past = ids.shape[1] - unseen.shape[1]
            positions = self.book.pos_emb.weight[past : ids.shape[1]]
            x = self.book.tok_emb(unseen) + positions
            for block, cache in zip(self.book.trf_blocks, caches, strict=True):
                x = _attend(block.att, block.norm1(x), cache) + x
                x = block.ff(block.norm2(x)) + x
            logits = self.book.out_head(self.book.final_norm(x))
            unseen = logits[:, -1].argmax(dim=-1, keepdim=True)
            ids = torch.cat((ids, unseen), dim=1)
        return ids


def _attend(att: Any, x: Tensor, cache: list[Tensor]) -> Tensor:
    split = (*x.shape[:2], att.num_heads, att.head_dim)
    q, k, v = (w(x).view(split).transpose(1, 2) for w in (att.W_query, att.W_key, att.W_value))
    if cache:
        k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
    cache[:] = k, v
    T, total = x.shape[1], k.shape[2]
    heads = causal_attention(q, k, v, att.mask.bool()[total - T : total, :total])
    joined: Tensor = att.out_proj(heads.transpose(1, 2).contiguous().view(x.shape))
    return joined
