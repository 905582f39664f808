"""A model's sizes, read from its modules, as a checkpoint needs them."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastgpt.config import WINDOW
from fastgpt.model.modules import (
    GELU,
    FeedForward,
    MultiHeadAttention,
    TransformerBlock,
)
from fastgpt.model.quantization import QuantizedEmbedding, QuantizedLinear
from fastgpt.weights.save import refuse
from fastgpt.weights.sizes import Quantization, Sizes


def described(model: Any) -> Sizes:
    """The sizes of a ``GPTModel``, read from its modules.

    Raises:
        WeightsError: a part of it is not as in GPT-2.
    """
    faults: list[str] = []
    heads: set[int] = set()
    epsilons: set[float] = set()
    drops: set[tuple[float, float]] = set()
    block: Any
    for i, block in enumerate(model.trf_blocks):
        name = f"trf_blocks.{i}"
        pieces = (block, getattr(block, "att", None), getattr(block, "ff", None))
        classes = (TransformerBlock, MultiHeadAttention, FeedForward)
        if not all(map(isinstance, pieces, classes)):
            kinds = ", ".join(type(piece).__name__ for piece in pieces)
            faults.append(f"{name} is not a block of the book's, but {kinds}")
            continue
        act = block.ff.layers[1]
        if not isinstance(act, GELU) and getattr(act, "approximate", None) != "tanh":
            faults.append(f"{name}.ff.layers.1 is a {type(act).__name__}, not the tanh GELU")
        if block.att.disable_causal_mask:
            faults.append(f"{name}.att has no causal mask")
        elif not block.att.is_causal():
            faults.append(f"{name}.att.mask is edited")
        heads.add(block.att.num_heads)
        epsilons |= {getattr(norm, "eps", 0.0) for norm in (block.norm1, block.norm2)}
        drops.add((_p(block.att.dropout), _p(block.drop_shortcut)))
    epsilons.add(getattr(model.final_norm, "eps", 0.0))
    for what, values in (("heads", heads), ("eps of the norms", epsilons), ("dropout", drops)):
        if len(values) > 1:
            faults.append(f"{what} differ: {', '.join(map(str, values))}")
    tok = model.tok_emb
    for name in ("tok_emb", "pos_emb"):
        table = getattr(model, name)
        if not isinstance(table, nn.Embedding) and type(table) is not QuantizedEmbedding:
            faults.append(f"{name} is a {type(table).__name__}, not nn.Embedding")
    kinds_of = {
        Quantization(layer.precision, layer.group or 32)
        for layer in model.modules()
        if isinstance(layer, QuantizedLinear)
    }
    if len(kinds_of) > 1:
        faults.append(f"precisions differ: {', '.join(sorted(q.precision for q in kinds_of))}")
    refuse(faults)
    rate = model.cfg["drop_rate"]
    attention, shortcut = drops.pop() if drops else (rate, rate)
    if isinstance(tok, QuantizedEmbedding):
        vocab_size, width = tok.num_embeddings, tok.embedding_dim
        tied = tok.shares_weight_with(model.out_head)
    else:
        vocab_size, width = tok.weight.shape
        tied = getattr(model.out_head, "weight", None) is tok.weight
    cfg = {
        "vocab_size": vocab_size,
        "context_length": model.pos_emb.weight.shape[0],
        "emb_dim": width,
        "n_heads": heads.pop() if heads else model.cfg["n_heads"],
        "n_layers": len(model.trf_blocks),
        "drop_rate": shortcut,
        "qkv_bias": any(".att.W_" in n and n.endswith("bias") for n, _ in model.named_parameters()),
    }
    if model.kv_window_size != model.max_context():
        cfg[WINDOW] = model.kv_window_size
    rates = (_p(model.drop_emb), attention, shortcut)
    return Sizes(cfg, epsilons.pop(), rates, tied, kinds_of.pop() if kinds_of else None)


def _p(dropout: nn.Module) -> float:
    return float(getattr(dropout, "p", 0.0))
