"""The book's model in PyTorch's own fused operations: the fast form without a compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class TorchGPT:
    """Inference on the parameters of a book's model, which it shares, but for query, key and value.

    Those three are packed, so that one product makes all of them.
    """

    def __init__(self, book: Any, cfg: dict[str, Any]) -> None:
        self.book, self.n_heads = book, cfg["n_heads"]
        self.packed = []
        for block in book.trf_blocks:
            parts = (block.att.W_query, block.att.W_key, block.att.W_value)
            weight = torch.cat([part.weight for part in parts]).detach()
            bias = torch.cat([part.bias for part in parts]).detach() if cfg["qkv_bias"] else None
            self.packed.append((weight, bias))

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [B, T]. Returns the logits, [B, T, V]."""
        B, T = ids.shape
        x = self.book.tok_emb(ids) + self.book.pos_emb.weight[:T]
        for block, (weight, bias) in zip(self.book.trf_blocks, self.packed, strict=True):
            qkv = F.linear(_norm(x, block.norm1), weight, bias).view(B, T, 3, self.n_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.att.out_proj(heads.transpose(1, 2).reshape(x.shape))
            widen, _, narrow = block.ff.layers
            x = x + narrow(F.gelu(widen(_norm(x, block.norm2)), approximate="tanh"))
        logits: Tensor = self.book.out_head(_norm(x, self.book.final_norm))
        return logits


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.scale, norm.shift, norm.eps)
