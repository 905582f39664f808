"""The book's model in PyTorch's own fused operations: the fast form without new kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Block(nn.Module):
    def __init__(self, block: Any, cfg: dict[str, Any]) -> None:
        super().__init__()
        parts = (block.att.W_query, block.att.W_key, block.att.W_value)
        width, bias = cfg["emb_dim"], cfg["qkv_bias"]
        self.n_heads, self.drop_rate = cfg["n_heads"], cfg["drop_rate"]
        self.qkv = nn.Linear(width, 3 * width, bias=bias, dtype=parts[0].weight.dtype)
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            if bias:
                self.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        self.out_proj, (self.widen, _, self.narrow) = block.att.out_proj, block.ff.layers
        self.norm1, self.norm2 = _norm(block.norm1, width), _norm(block.norm2, width)
        self.drop = nn.Dropout(cfg["drop_rate"])

    def forward(self, x: Tensor, cache: Tensor | None = None, past: int = 0) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D / H]
        if cache is not None:  # [2, B, H, at least past + T, D / H]
            cache[0, :, :, past : past + T], cache[1, :, :, past : past + T] = k, v
            k, v = cache[:, :, :, : past + T]
        p = self.drop_rate if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=p)
        x = x + self.drop(self.out_proj(heads.transpose(1, 2).reshape(B, T, D)))
        hidden = F.gelu(self.widen(self.norm2(x)), approximate="tanh")
        return x + self.drop(self.narrow(hidden))


class TorchGPT(nn.Module):
    """Shares the parameters of a book's model, but for query, key and value: those are copied into
    one weight, so that one product makes all three.
    """

    def __init__(self, book: Any, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb, self.out_head = book.tok_emb, book.pos_emb, book.out_head
        self.drop = nn.Dropout(cfg["drop_rate"])
        self.blocks: Any = nn.ModuleList([_Block(block, cfg) for block in book.trf_blocks])
        self.norm = _norm(book.final_norm, cfg["emb_dim"])

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [B, T]. Returns the logits, [B, T, V]."""
        x = self.drop(self.tok_emb(ids) + self.pos_emb.weight[: ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.out_head(self.norm(x))
        return logits

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int) -> Tensor:
        """ids: [B, T]. Returns [B, T + max_new_tokens], which must fit the context."""
        (B, total), D = ids.shape, self.tok_emb.weight.shape[1]
        shape = (2, B, self.blocks[0].n_heads, total + max_new_tokens, D // self.blocks[0].n_heads)
        caches = [self.tok_emb.weight.new_empty(shape) for _ in self.blocks]
        unseen, past = ids, 0
        for _ in range(max_new_tokens):
            total = past + unseen.shape[1]
            x = self.tok_emb(unseen) + self.pos_emb.weight[past:total]
            for block, cache in zip(self.blocks, caches, strict=True):
                x = block(x, cache, past)
            unseen = self.out_head(self.norm(x[:, -1:])).argmax(dim=-1)
            ids, past = torch.cat((ids, unseen), dim=1), total
        return ids


def _norm(norm: Any, width: int) -> nn.LayerNorm:
    fused = nn.LayerNorm(width, eps=norm.eps, dtype=norm.scale.dtype)
    fused.weight, fused.bias = norm.scale, norm.shift
    return fused
