"""The whole stack in as few calls into C++ as its pieces allow, where no gradient is recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import dispatch
from fastgpt.config import check_ids
from fastgpt.cpu.forward import EPS, Run, address, linear
from fastgpt.kv_cache import Slot, Staged
from fastgpt.model import (
    GELU,
    FeedForward,
    GPTModel,
    LayerNorm,
    MultiHeadAttention,
    TransformerBlock,
)
from fastgpt.plain import drops_nothing, plain


def forward(
    model: GPTModel, idx: Tensor, past: int, cache: Staged | None, last_only: bool
) -> Tensor | None:
    """Logits of all tokens or the last, [B, T or 1, vocab_size]; None where nothing here can run.

    Each piece that is plainly ours joins the next call; any other runs as the module it is.
    """
    if not dispatch.takes_whole_pass(idx) or not plain(model.trf_blocks, nn.Sequential):
        return None
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        return None
    first = next((b for b in model.trf_blocks if type(b) is TransformerBlock), None)
    if first is None or idx.numel() == 0:
        return None
    att: Any = first.att
    run = Run(model, idx, att.d_out, att.num_heads, att.head_dim)
    run.past, run.limit = past, model._context()
    if not _embed(model, run, idx):
        positions = torch.arange(past, past + idx.shape[1])
        run.x = model.drop_emb(model._token_embeddings(idx) + model.pos_emb(positions))
    for layer, block in enumerate(model.trf_blocks):
        if not _add(block, run, cache, layer):
            run.x = block(run.x) if cache is None else block(run.x, cache, layer)
    logits = _finish(model, run, last_only)
    if logits is not None:
        return logits
    x = run.x[:, -1:] if last_only else run.x
    return model.out_head(model.final_norm(x))


def _embed(model: GPTModel, run: Run, idx: Tensor) -> bool:
    tokens, positions = model.tok_emb, model.pos_emb
    for table in (tokens, positions):
        if not plain(table, nn.Embedding) or table.max_norm is not None:
            return False
    if not drops_nothing(model.drop_emb) or not run.embed(tokens.weight, positions.weight):
        return False
    check_ids(idx, tokens.weight.shape[0])
    return True


def _norm(norm: Any, width: int) -> tuple[int, int] | None:
    if not plain(norm, LayerNorm) or norm.eps != EPS:
        return None
    scale, shift = (address(norm._parameters[name], width) for name in ("scale", "shift"))
    return None if scale is None or shift is None else (scale, shift)


def _add(block: Any, run: Run, cache: Staged | None, layer: int) -> bool:
    """Adds the block to the run if every piece of it is plainly ours; says whether."""
    if not plain(block, TransformerBlock):
        return False
    att, ff, width = block.att, block.ff, run.width
    if not (
        plain(att, MultiHeadAttention)
        and plain(ff, FeedForward)
        and plain(ff.layers, nn.Sequential)
        and len(ff.layers) == 3
        and plain(ff.layers[1], GELU)
        and drops_nothing(block.drop_shortcut)
        and drops_nothing(att.dropout)
        and (att.num_heads, att.head_dim, att.d_out) == (run.heads, run.head_dim, width)
        and att._mask_is_causal()
        and run.past + run.ids.shape[1] <= att._context()
    ):
        return False
    up, down = ff.layers[0], ff.layers[2]
    linears = (att.W_query, att.W_key, att.W_value, att.out_proj, up, down)
    if not all(plain(module, nn.Linear) for module in linears):
        return False
    hidden = up.out_features
    sizes = [(width, width)] * 4 + [(width, hidden), (hidden, width)]
    records = [linear(m, *size) for m, size in zip(linears, sizes, strict=True)]
    norms = [_norm(norm, width) for norm in (block.norm1, block.norm2)]
    if None in records or None in norms:
        return False
    slot = _slot(run, cache, layer)
    q, k, v, out, up_, down_ = records
    run.add((*norms[0], *q, *k, *v, *out, *norms[1], *up_, *down_, *slot), hidden)  # type: ignore[misc]
    return True


def _slot(run: Run, cache: Staged | None, layer: int) -> tuple[int, int]:
    """Where the layer's keys and values are to go; the run writes them."""
    if cache is None:
        return 0, 0
    B, T = run.ids.shape
    shape = (B, run.heads, run.past + T, run.head_dim)
    old = cache.get(layer)
    slot = Slot.longer(old, shape, max(run.limit, shape[2]), torch.empty(0))
    cache.update(layer, slot)
    keys, values = slot.blocks.keys, slot.blocks.values
    run.take_capacity(keys.shape[2])
    return keys.data_ptr(), values.data_ptr()


def _finish(model: GPTModel, run: Run, last_only: bool) -> Tensor | None:
    head: Any = model.out_head
    if not plain(head, nn.Linear):
        return None
    norm = _norm(model.final_norm, run.width)
    record = linear(head, run.width, head.out_features)
    if norm is None or record is None:
        return None
    return run.finish(norm, record, last_only)
