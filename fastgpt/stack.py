"""What runs as one call into C++: where gradients are off the whole stack, as far as its pieces are
plainly ours; in training each block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import dispatch, ops
from fastgpt.config import check_ids
from fastgpt.cpu.forward import Run
from fastgpt.cpu.records import address, linear
from fastgpt.cpu.transformer_block import EPS, BlockParameters
from fastgpt.cpu.transformer_block import record as block_record
from fastgpt.kv_cache import Slot, Staged
from fastgpt.model import GPTModel
from fastgpt.modules import GELU, FeedForward, LayerNorm, MultiHeadAttention, TransformerBlock
from fastgpt.plain import drop_probability, drops_nothing, plain, plain_linear

Memo = dict[Any, Any]


def forward(
    model: GPTModel,
    idx: Tensor,
    past: int = 0,
    cache: Staged | None = None,
    last_only: bool = False,
    memo: Memo | None = None,
) -> Tensor | None:
    """Logits of all tokens or the last, [B, T or 1, vocab_size]; None where nothing here can run.

    Each piece that is plainly ours joins the next call; any other runs as the module it is. The
    memo spares looking at the pieces again, and is only for calls between which nothing can change.
    """
    memo = {} if memo is None else memo
    run = _run(model, idx, past, cache, memo)
    if run is None:
        return None
    end = _remembered(memo, "end", _end, model, run)
    if end is not None and run.fits():
        norm, head = end
        return run.finish(norm, head, last_only)
    x = run.x[:, -1:] if last_only else run.x
    return model.out_head(model.final_norm(x))


def features(model: GPTModel, idx: Tensor) -> Tensor | None:
    """What the head gets, [B, T, emb_dim]; None where nothing here can run."""
    run = _run(model, idx, 0, None, {})
    if run is None:
        return None
    norm = _norm(model.final_norm, run.width)
    return run.finish(norm) if norm is not None and run.fits() else model.final_norm(run.x)


def _run(model: GPTModel, idx: Tensor, past: int, cache: Staged | None, memo: Memo) -> Run | None:
    """A pass that has taken everything up to the final norm."""
    if not dispatch.takes_whole_pass(idx) or not plain(model.trf_blocks, nn.Sequential):
        return None
    attentions = [b.att for b in model.trf_blocks if type(b) is TransformerBlock]
    att: Any = next((a for a in attentions if type(a) is MultiHeadAttention), None)
    if att is None or idx.numel() == 0:
        return None
    run = Run(model, idx, att.d_out, att.num_heads, att.head_dim)
    run.past, run.limit = past, model._context()
    tables = _remembered(memo, "tables", _embeddings, model, run)
    if tables is None:
        positions = torch.arange(past, past + idx.shape[1], device=idx.device)
        run.x = model.drop_emb(model._token_embeddings(idx) + model.pos_emb(positions))
    else:
        check_ids(idx, model.tok_emb.weight.shape[0])
        run.embed(tables)
    block: Any
    for layer, block in enumerate(model.trf_blocks):
        record = _remembered(memo, layer, _block, block, run)
        if record is not None and run.fits() and past + idx.shape[1] <= block.att._context():
            fields, hidden = record
            run.add(fields, hidden, _slot(run, cache, layer))
        else:
            run.x = block(run.x) if cache is None else block(run.x, cache, layer)
    return run


def _remembered(memo: Memo, key: Any, look: Any, *pieces: Any) -> Any:
    if key not in memo:
        memo[key] = look(*pieces)
    return memo[key]


def _embeddings(model: GPTModel, run: Run) -> tuple[int, int] | None:
    if not drops_nothing(model.drop_emb):
        return None
    found = []
    for table in (model.tok_emb, model.pos_emb):
        if not plain(table, nn.Embedding) or table.max_norm is not None:
            return None
        found.append(address(table.weight, table.weight.shape[0], run.width))
    return None if None in found else (found[0], found[1])  # type: ignore[return-value]


def _norm(norm: Any, width: int) -> tuple[int, int] | None:
    if not plain(norm, LayerNorm) or norm.eps != EPS:
        return None
    scale, shift = (address(norm._parameters.get(name), width) for name in ("scale", "shift"))
    return None if scale is None or shift is None else (scale, shift)


class Block(NamedTuple):
    """A block whose pieces are plainly ours."""

    parameters: BlockParameters
    width: int
    heads: int
    attention_p: float
    shortcut_p: float


def taken_apart(block: Any) -> Block | None:
    """The block's parameters, sizes and dropouts; None where a piece of it is not plainly ours."""
    if not plain(block, TransformerBlock):
        return None
    # Past nn.Module's own look-up, which for a small model would cost as much as the arithmetic.
    pieces = block._modules
    att, ff = pieces.get("att"), pieces.get("ff")
    if not (plain(att, MultiHeadAttention) and plain(ff, FeedForward)):
        return None
    inner, layers = att._modules, ff._modules.get("layers")
    attention_p = drop_probability(inner.get("dropout"))
    shortcut_p = drop_probability(pieces.get("drop_shortcut"))
    if not (
        plain(layers, nn.Sequential)
        and list(layers._modules) == ["0", "1", "2"]
        and plain(layers._modules["1"], GELU)
        and attention_p is not None
        and shortcut_p is not None
        and att.num_heads * att.head_dim == att.d_out
        and att._mask_is_causal()
    ):
        return None
    norms = (pieces.get("norm1"), pieces.get("norm2"))
    for norm in norms:
        if not plain(norm, LayerNorm) or norm.eps != EPS:
            return None
    names = ("W_query", "W_key", "W_value", "out_proj")
    linears = (*(inner.get(name) for name in names), layers._modules["0"], layers._modules["2"])
    held: list[Any] = []
    for module in linears:
        if not plain_linear(module):
            return None
        held += (module._parameters["weight"], module._parameters["bias"])
    scales = [norm._parameters.get(name) for norm in norms for name in ("scale", "shift")]
    parameters = BlockParameters(*scales[:2], *held[:8], *scales[2:], *held[8:])
    return Block(parameters, att.d_out, att.num_heads, attention_p, shortcut_p)


def _block(block: Any, run: Run) -> tuple[tuple[int, ...], int] | None:
    """The fields of struct Block but for its caches, and the width of its feed-forward's middle."""
    b = taken_apart(block)
    if b is None or b.attention_p or b.shortcut_p:
        return None
    if (b.width, b.heads) != (run.width, run.heads):
        return None
    record = block_record(b.parameters, run.width)
    return None if record is None else (record, b.parameters.up_weight.shape[0])


def block_step(
    block: TransformerBlock, x: Tensor, branch: Tensor | None, owner: nn.Module
) -> Tensor | None:
    """The block on x + branch as one operation, with gradients or without; None where it can't be
    one.

    Raises:
        ValueError: the tokens are more than the block's context length.
    """
    if not dispatch.runs_whole(x):
        return None
    b = taken_apart(block)
    if b is None or x.dim() != 3 or x.shape[2] != b.width:
        return None
    block.att._check_tokens(x.shape[1])
    x = x if branch is None else branch + x
    return ops.transformer_block(x, b.parameters, b.heads, b.attention_p, b.shortcut_p, owner)


def _slot(run: Run, cache: Staged | None, layer: int) -> tuple[int, int]:
    """Where the layer's keys and values are to go; the run writes them."""
    if cache is None:
        return 0, 0
    B, T = run.ids.shape
    shape = (B, run.heads, run.past + T, run.head_dim)
    old = cache.get(layer)
    slot = Slot.longer(old, shape, run.limit, torch.empty(0, dtype=torch.float32, device="cpu"))
    cache.update(layer, slot)
    keys, values = slot.blocks.keys, slot.blocks.values
    run.take_capacity(keys.shape[2])
    return keys.data_ptr(), values.data_ptr()


def _end(model: GPTModel, run: Run) -> tuple[tuple[int, int], tuple[int, ...]] | None:
    """The records of the final norm and the head."""
    head: Any = model.out_head
    if not plain_linear(head):
        return None
    norm = _norm(model.final_norm, run.width)
    weight, bias = head._parameters["weight"], head._parameters["bias"]
    record = linear(weight, bias, run.width, int(head.out_features))
    return None if norm is None or record is None else (norm, record)
