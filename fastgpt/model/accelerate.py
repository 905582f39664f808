"""A fused model over the parameters of one that already exists."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.model.gpt import GPTModel
from fastgpt.torch_state import product_eps
from fastgpt.weights.meta import on_meta
from fastgpt.weights.shared_grad import Cut, shared_parts
from fastgpt.weights.sizes import refused_setting

_PROJECTIONS = ("W_query", "W_key", "W_value")


def accelerate(model: nn.Module) -> GPTModel:
    """A ``GPTModel`` that computes what this model computes, with its parameters and no copy.

    Takes the book's GPTModel from any module, its faster variant with a packed att.qkv, and
    Hugging Face's GPT2LMHeadModel, recognised by their parts; a few tokens through both confirm it.
    The result returns logits [B, T, vocab_size].

    Embeddings, linear layers and whatever stands in their place (LoRA) are the same modules, norms
    have the same parameters, so training either model trains both. Hugging Face's Conv1D weights
    and the packed projections are parameters of their own here, transposed or cut, in the same
    memory: an optimiser over either model's parameters changes both, and their .grad is cut from
    the other model's .grad, so one may run backward through this model and step an optimiser of
    the other. That link ends where a parameter gets other memory: move and cast (.to, .half,
    load_state_dict(assign=True)) before accelerating, or accelerate again.

    Dropout rates, the mask, requires_grad of cut parameters, and train or eval mode are taken over
    once. A ``fastgpt.GPTModel`` comes back as it is.

    Args:
        model: what to accelerate; it stays usable, and as it is.

    Raises:
        TypeError: a part is not as in these models, has hooks that the result would not run, or
            computes something else; the message names it.
    """
    if isinstance(model, GPTModel):
        return model
    children = dict(model.named_children())
    if {"tok_emb", "trf_blocks"} <= children.keys():
        ours = _over_the_books(model)
    elif {"transformer", "lm_head"} <= children.keys():
        ours = _over_hugging_faces(model)
    else:
        raise TypeError(
            f"{type(model).__name__} is neither the book's GPTModel (tok_emb, trf_blocks, ...) nor "
            f"GPT2LMHeadModel (transformer, lm_head); it has {', '.join(children) or 'no parts'}"
        )
    _confirm(model, ours)
    return ours.train(model.training)


@dataclass
class _Block:
    """The pieces of one of their blocks, by what they are here."""

    path: str
    att: Any
    projections: Sequence[Any]  # query, key and value, or all in one
    linears: Sequence[Any]  # out_proj, ff.layers.0 and ff.layers.2
    act: nn.Module
    norms: Sequence[nn.Module]
    rates: tuple[float, float]  # of the attention weights and the shortcuts


def _over_the_books(model: nn.Module) -> GPTModel:
    names = ("tok_emb", "pos_emb", "drop_emb", "trf_blocks", "final_norm", "out_head")
    tok, pos, drop, blocks, norm, head = _parts(model, "", names)
    _need(blocks, "trf_blocks", nn.Sequential, nn.ModuleList)
    _untouched(blocks, "trf_blocks")
    found = [_books_block(block, f"trf_blocks.{i}") for i, block in enumerate(blocks)]
    ours = _frame(tok, pos, drop, norm, found)
    ours.out_head = head
    mine: Any
    for mine, theirs in zip(ours.trf_blocks, found, strict=True):
        if len(theirs.projections) == 1:
            _share(_qkv(mine), theirs.projections[0], _thirds(tok.embedding_dim))
        else:
            mine.att.W_query, mine.att.W_key, mine.att.W_value = theirs.projections
        mine.att.out_proj, mine.ff.layers[0], mine.ff.layers[2] = theirs.linears
        if isinstance(getattr(theirs.att, "mask", None), Tensor):
            mine.att.set_mask(theirs.att.mask)
        mine.att.disable_causal_mask = bool(getattr(theirs.att, "disable_causal_mask", False))
    window: Any = getattr(model, "kv_window_size", None)
    if window is not None:
        ours.kv_window_size = window
    return ours


def _books_block(block: nn.Module, path: str) -> _Block:
    drop = "drop_resid" if hasattr(block, "drop_resid") else "drop_shortcut"
    att, ff, norm1, norm2, shortcut = _parts(block, path, ("att", "ff", "norm1", "norm2", drop))
    names = ["qkv", "proj"] if hasattr(att, "qkv") else ["W_query", "W_key", "W_value", "out_proj"]
    rate = getattr(att, "dropout", 0.0)
    if isinstance(rate, nn.Module):
        names.append("dropout")
    pieces = _parts(att, f"{path}.att", names)[: 2 if hasattr(att, "qkv") else 4]
    if hasattr(att, "qkv"):
        _need(att.qkv, f"{path}.att.qkv", nn.Linear)
        _untouched(att.qkv, f"{path}.att.qkv")
    (layers,) = _parts(ff, f"{path}.ff", ("layers",))
    up, act, down = _parts(layers, f"{path}.ff.layers", ("0", "1", "2"))
    rates = (_rate(rate, f"{path}.att.dropout"), _rate(shortcut, f"{path}.{drop}"))
    return _Block(path, att, pieces[:-1], (pieces[-1], up, down), act, (norm1, norm2), rates)


def _over_hugging_faces(model: nn.Module) -> GPTModel:
    transformer, head = _parts(model, "", ("transformer", "lm_head"))
    names = ("wte", "wpe", "drop", "h", "ln_f")
    tok, pos, drop, blocks, norm = _parts(transformer, "transformer", names)
    config = getattr(model, "config", None)
    width = getattr(tok, "embedding_dim", 0)
    refused = refused_setting(lambda key, default: getattr(config, key, default), width)
    if refused:
        raise TypeError(f"{type(model).__name__} has {refused}, which the book's model has not")
    _need(blocks, "transformer.h", nn.ModuleList)
    found = [_their_block(block, f"transformer.h.{i}") for i, block in enumerate(blocks)]
    ours = _frame(tok, pos, drop, norm, found)
    ours.out_head = head
    mine: Any
    for mine, theirs in zip(ours.trf_blocks, found, strict=True):
        _share(_qkv(mine), theirs.projections[0], _thirds(width, columns=True))
        targets = (mine.att.out_proj, mine.ff.layers[0], mine.ff.layers[2])
        for target, conv in zip(targets, theirs.linears, strict=True):
            _share([target], conv, [Tensor.t])
    return ours


def _their_block(block: nn.Module, path: str) -> _Block:
    ln_1, attn, ln_2, mlp = _parts(block, path, ("ln_1", "attn", "ln_2", "mlp"))
    names = ("c_attn", "c_proj", "attn_dropout", "resid_dropout")
    qkv, proj, drop, shortcut = _parts(attn, f"{path}.attn", names)
    up, down, act, second = _parts(mlp, f"{path}.mlp", ("c_fc", "c_proj", "act", "dropout"))
    named = {"attn.c_attn": qkv, "attn.c_proj": proj, "mlp.c_fc": up, "mlp.c_proj": down}
    for name, conv in named.items():
        if type(conv).__name__ != "Conv1D" or conv._parameters.keys() != {"weight", "bias"}:
            raise TypeError(f"{path}.{name} is a {type(conv).__name__}, not a Conv1D")
        _untouched(conv, f"{path}.{name}")
    rates = [
        _rate(module, f"{path}.{name}")
        for name, module in (
            ("attn.attn_dropout", drop),
            ("attn.resid_dropout", shortcut),
            ("mlp.dropout", second),
        )
    ]
    if rates[1] != rates[2]:
        raise TypeError(f"{path}.mlp.dropout is {rates[2]}, {path}.attn.resid_dropout {rates[1]}")
    return _Block(path, attn, [qkv], (proj, up, down), act, (ln_1, ln_2), (rates[0], rates[1]))


def _frame(tok: Any, pos: Any, drop: Any, norm: Any, blocks: Sequence[_Block]) -> GPTModel:
    """A model of these sizes with all but its linear layers."""
    _need(tok, "the token embedding", nn.Embedding)
    _need(pos, "the position embedding", nn.Embedding)
    heads = [getattr(block.att, "num_heads", None) for block in blocks] or [1]
    if not isinstance(heads[0], int) or set(heads) != {heads[0]}:
        raise TypeError(f"num_heads must be one number in all blocks, got {heads}")
    first = blocks[0].projections[0] if blocks else None
    cfg = {
        "vocab_size": tok.num_embeddings,
        "context_length": pos.num_embeddings,
        "emb_dim": tok.embedding_dim,
        "n_heads": heads[0],
        "n_layers": len(blocks),
        "drop_rate": blocks[0].rates[1] if blocks else 0.0,
        "qkv_bias": getattr(first, "bias", None) is not None,
    }
    ours = on_meta(GPTModel, cfg)
    ours.tok_emb, ours.pos_emb = tok, pos
    ours.drop_emb.p = _rate(drop, "the dropout of the embeddings")
    _share_norm(ours.final_norm, norm, "the final norm")
    mine: Any
    for mine, theirs in zip(ours.trf_blocks, blocks, strict=True):
        mine.att.dropout.p, mine.drop_shortcut.p = theirs.rates
        _share_norm(mine.norm1, theirs.norms[0], f"{theirs.path}: the first norm")
        _share_norm(mine.norm2, theirs.norms[1], f"{theirs.path}: the second norm")
        _untouched(theirs.act, f"{theirs.path}: the activation")
        if any(True for _ in theirs.act.parameters()):
            raise TypeError(f"{theirs.path}: the activation has parameters")
        x = torch.linspace(-6, 6, 97)
        _same(f"{theirs.path}: the activation", theirs.act(x), mine.ff.layers[1](x))
    return ours


def _share_norm(mine: Any, theirs: nn.Module, path: str) -> None:
    names = ("weight", "bias") if isinstance(theirs, nn.LayerNorm) else ("scale", "shift")
    scale, shift = (theirs._parameters.get(name) for name in names)
    if scale is None or shift is None or len(theirs._parameters) != 2:
        raise TypeError(f"{path} is a {type(theirs).__name__} without {' and '.join(names)}")
    _untouched(theirs, path)
    mine.scale, mine.shift, mine.eps = scale, shift, float(getattr(theirs, "eps", mine.eps))
    # So little spread that eps counts.
    x = 0.01 + 0.02 * _random(3, *scale.shape).to(scale.device, scale.dtype)
    if not scale.is_meta:
        with torch.no_grad():
            _same(path, theirs(x), mine(x))


def _share(mine: Sequence[nn.Linear], theirs: Any, weights: Sequence[Cut]) -> None:
    """Gives linear layers the parts of one; its bias goes to one whole, to several in parts."""
    for layer, weight in zip(mine, shared_parts(theirs.weight, weights), strict=True):
        layer.weight = weight
    bias = theirs.bias
    if bias is None or len(mine) == 1:
        parts = [bias] * len(mine)
    else:
        parts = shared_parts(bias, _thirds(bias.shape[0] // 3))
    for layer, part in zip(mine, parts, strict=True):
        layer.bias = part


def _qkv(block: Any) -> list[nn.Linear]:
    return [block.att.W_query, block.att.W_key, block.att.W_value]


def _thirds(size: int, columns: bool = False) -> list[Cut]:
    """Cuts into three: of rows [3 size, ...], or of columns [width, 3 size] that become rows."""
    cut = _columns if columns else _rows
    return [functools.partial(cut, start=i * size, size=size) for i in range(3)]


def _rows(tensor: Tensor, start: int, size: int) -> Tensor:
    return tensor.narrow(0, start, size)


def _columns(tensor: Tensor, start: int, size: int) -> Tensor:
    return tensor.narrow(1, start, size).t()


def _parts(module: nn.Module, path: str, names: Sequence[str]) -> list[Any]:
    """The children of these names of a module that has no others, and nothing else of its own."""
    children, shown = dict(module.named_children()), path or type(module).__name__
    missing = [name for name in names if name not in children]
    extra = [name for name in (*children, *module._parameters) if name not in names]
    if missing or extra:
        faults = (("has no", missing), ("has also", extra))
        told = (f"{verb} {', '.join(found)}" for verb, found in faults if found)
        raise TypeError(f"{shown} {' and '.join(told)}")
    _untouched(module, shown)
    return [children[name] for name in names]


def _need(module: Any, path: str, *classes: type[nn.Module]) -> None:
    if not isinstance(module, classes):
        wanted = " or ".join(f"nn.{cls.__name__}" for cls in classes)
        raise TypeError(f"{path} is a {type(module).__name__}, not {wanted}")


def _untouched(module: nn.Module, path: str) -> None:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, kind) for kind in hooks):
        raise TypeError(f"{path} has a hook, which the fused model would not run")
    if "forward" in module.__dict__:
        raise TypeError(f"{path} has a forward of its own")


def _rate(dropout: Any, path: str) -> float:
    """The probability of a dropout, which the book's faster variant keeps as a number."""
    if isinstance(dropout, (int, float)):
        return float(dropout)
    if type(dropout) not in (nn.Dropout, nn.Identity):
        raise TypeError(f"{path} is a {type(dropout).__name__}, not nn.Dropout")
    _untouched(dropout, path)
    return float(getattr(dropout, "p", 0.0))


def _random(*shape: int) -> Tensor:
    """Normal numbers that leave everybody else's generator alone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _same(path: str, theirs: Tensor, ours: Tensor, tolerance: float = 1e-5) -> None:
    """TypeError if two results differ by more than rounding in their dtype and its products."""
    scale = float(theirs.abs().max())
    error = float((theirs - ours).abs().max()) if theirs.shape == ours.shape else float("inf")
    # Written so that NaN is refused too, unless both have it.
    if not error <= max(tolerance, 8 * product_eps(theirs)) * scale and scale == scale:
        raise TypeError(f"{path} computes something else than the book's (off by {error:.1e})")


def _confirm(model: nn.Module, ours: GPTModel) -> None:
    """TypeError if the two do not give the same logits, or attend the same way."""
    if ours.pos_emb.weight.is_meta:
        return
    modes = [(module, module.training) for module in (*model.modules(), *ours.modules())]
    like = ours.pos_emb.weight
    tokens, (vocabulary, width) = min(6, like.shape[0]), ours.tok_emb.weight.shape
    ids = (_random(2, tokens).abs() * 1e6).long().remainder(vocabulary).to(like.device)
    try:
        model.eval()
        ours.eval()
        with torch.no_grad():
            blocks: Any = getattr(model, "trf_blocks", ())
            x = _random(2, tokens, width).to(like.device, like.dtype)
            theirs: Any
            mine: Any
            for i, (theirs, mine) in enumerate(zip(blocks, ours.trf_blocks, strict=False)):
                _same(f"trf_blocks.{i}.att", _first(theirs.att(x)), mine.att(x), 1e-4)
            try:
                right = model(ids)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                told = f"{type(model).__name__} cannot be called with token ids [B, T] alone"
                raise TypeError(f"{told}: {error}") from error
            logits = _first(getattr(right, "logits", right))
            _same(type(model).__name__, logits, ours(ids), 1e-4)
    finally:
        for module, mode in modes:
            module.training = mode


def _first(result: Any) -> Tensor:
    """The result of a module that may return its cache beside it."""
    return result[0] if isinstance(result, tuple) else result
