"""Loads and saves weights: the book's checkpoints, Hugging Face's and OpenAI's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from fastgpt.quantized_weight import check_precision
from fastgpt.weights import fill, hub, quantized
from fastgpt.weights.files import Memory, Source
from fastgpt.weights.meta import make_room, on_meta
from fastgpt.weights.names import Style, WeightsError, style_of
from fastgpt.weights.save import save_pretrained
from fastgpt.weights.sizes import Quantization, Sizes, completed

__all__ = [
    "WeightsError",
    "from_pretrained",
    "load_weights",
    "load_weights_into_gpt",
    "save_pretrained",
]

Model = TypeVar("Model", bound=nn.Module)


def from_pretrained(
    cls: type[Model],
    name_or_path: str | os.PathLike[str],
    cfg: Mapping[str, Any] | None = None,
    *,
    convert: Callable[..., Model],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    quantize: str | None = None,
    group: int = 32,
    **hub_options: Any,
) -> Model:
    """Makes a model from weights: see ``GPTModel.from_pretrained``.

    Args:
        convert: makes a quantised model of one, both on meta, as ``fastgpt.quantize`` does.
    """
    asked = None if quantize is None else Quantization(quantize, group)
    if asked is not None:
        check_precision(*asked)
    source, known = hub.locate(name_or_path, **hub_options)
    sizes, style = _completed(source, known, cfg)
    _check_sizes(source, sizes)
    masks: Mapping[int, torch.Tensor] = {}
    if sizes.quantization is None:  # before the model is made, whose size a file may overstate
        plan = fill.Plan(source, style, sizes.cfg, sizes.tied)
        model = on_meta(cls, sizes.cfg)
        plan.check(dict(model.named_parameters()))
        masks, fills, tied = plan.edited_masks(), plan.fills, plan.tied
    elif asked is not None and asked.precision != sizes.quantization.precision:
        raise WeightsError(
            f"{source.label} is quantised to {sizes.quantization.precision}, and cannot be loaded "
            f"as {quantize}: quantise the model that it was made from"
        )
    else:
        asked, tied = sizes.quantization, bool(sizes.tied)
        fills = quantized.check_source(source, sizes)
        model = on_meta(cls, sizes.cfg)
    if tied:
        model.out_head.weight = model.tok_emb.weight  # type: ignore[union-attr]
    if asked is not None:
        model = convert(model if dtype is None else model.to(dtype), *asked)
    make_room(model, dtype, device)
    fill.copy(source, fills, _targets(model))
    _set_masks(model, masks)
    _set_rates(model, sizes)
    return model.eval()


def load_weights(
    model: nn.Module, name_or_path: str | os.PathLike[str], **hub_options: Any
) -> None:
    """Loads weights into an existing model, in its dtype and on its device.

    The values of its parameters change, the parameter objects stay. Nothing is written unless
    every tensor fits.

    Args:
        model: the book's GPTModel, from this package or any other, of the same sizes.
        name_or_path: as for ``GPTModel.from_pretrained``.
        hub_options: as for ``GPTModel.from_pretrained``.

    Raises:
        WeightsError: tensors are missing, unexpected or of the wrong shape; all are named.
    """
    source, sizes = hub.locate(name_or_path, **hub_options)
    _load(model, source, sizes)


def load_weights_into_gpt(gpt: nn.Module, params: Mapping[str, Any]) -> None:
    """The book's function: loads OpenAI's weights, a dictionary of arrays, into a model.

    Unlike the book's, it writes into the existing parameters, so a tied head stays tied and an
    optimiser keeps its parameters, and it writes nothing unless every array fits.

    Args:
        gpt: the book's GPTModel, from this package or any other, with qkv_bias True.
        params: arrays or tensors, nested (wte, wpe, g, b, blocks) or flat, under any names that
            ``load_weights`` takes from a file.

    Raises:
        WeightsError: arrays are missing, unexpected or of the wrong shape; all are named.
    """
    _load(gpt, Memory(params, "params"), Sizes())


def _load(model: nn.Module, source: Source, sizes: Sizes) -> None:
    if sizes.quantization is not None:
        raise WeightsError(
            f"{source.label} is quantised to {sizes.quantization.precision}: load it with "
            "GPTModel.from_pretrained"
        )
    if any(hasattr(module, "quantized_weight") for module in model.modules()):
        raise WeightsError(
            "weights cannot be loaded into a quantised model: load them with "
            "GPTModel.from_pretrained(..., quantize=...)"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [k for k in ("tok_emb.weight", "pos_emb.weight") if k not in parameters]
    blocks: Any = getattr(model, "trf_blocks", None)
    if missing or blocks is None:
        raise TypeError(f"{type(model).__name__} is not the book's GPTModel")
    if any(p.is_meta for p in parameters.values()):
        raise ValueError("the model is on the meta device: call model.to_empty(device='cpu') first")
    attentions: list[Any] = [getattr(block, "att", None) for block in blocks]
    heads = {att.num_heads for att in attentions if hasattr(att, "num_heads")}
    n_heads = sizes.cfg.get("n_heads")
    if n_heads is not None and heads - {n_heads}:
        raise WeightsError(
            f"{source.label} has {n_heads} heads, the model {' and '.join(map(str, heads))}"
        )
    vocabulary, width = parameters["tok_emb.weight"].shape
    cfg = {
        "vocab_size": vocabulary,
        "context_length": parameters["pos_emb.weight"].shape[0],
        "emb_dim": width,
        "n_layers": len(blocks),
        "n_heads": n_heads or 1,
        "drop_rate": 0.0,
        "qkv_bias": any(".att.W_" in key and key.endswith("bias") for key in parameters),
    }
    plan = _planned(source, Sizes(tied=sizes.tied), cfg)[1]
    plan.check(parameters)
    masks = plan.edited_masks()
    maskless = [i for i in masks if getattr(attentions[i], "disable_causal_mask", False)]
    if maskless:
        names = ", ".join(plan.masks[i] for i in maskless)
        raise WeightsError(f"{source.label} has edited masks, and the model has none: {names}")
    fill.copy(source, plan.fills, parameters)
    _set_masks(model, masks, causal=plan.masks.keys() - masks.keys())


def _targets(model: nn.Module) -> dict[str, fill.Target]:
    """What a file's tensors fill: parameters, buffers, and quantised weights as a whole, each under
    the name of the weight in full precision.
    """
    targets: dict[str, fill.Target] = dict(model.named_parameters(remove_duplicate=False))
    targets |= model.named_buffers(remove_duplicate=False)
    for path, module in model.named_modules():
        if hasattr(module, "quantized_weight"):
            targets[f"{path}.weight"] = module.quantized_weight
    return targets


def _planned(
    source: Source, known: Sizes, cfg: Mapping[str, Any] | None
) -> tuple[Sizes, fill.Plan]:
    sizes, style = _completed(source, known, cfg)
    return sizes, fill.Plan(source, style, sizes.cfg, sizes.tied)


def _completed(source: Source, known: Sizes, cfg: Mapping[str, Any] | None) -> tuple[Sizes, Style]:
    style = style_of(source.stored)
    if style is None:
        found = ", ".join(list(source.stored)[:8]) or "nothing"
        raise WeightsError(f"{source.label} has no tensors named as in a GPT-2, but: {found}")
    shapes = {name: stored.shape for name, stored in source.stored.items()}
    return completed(known, cfg, style, shapes), style


def _check_sizes(source: Source, sizes: Sizes) -> None:
    """Raises WeightsError if these sizes, which anything may stand in, are beyond the tensors."""
    most = dict.fromkeys(("vocab_size", "context_length", "emb_dim"), 1 << 31)
    for name, largest in (most | {"n_layers": len(source.stored)}).items():
        if sizes.cfg[name] > largest:
            raise WeightsError(f"{source.label} has no tensors for {name} {sizes.cfg[name]}")


def _set_masks(model: Any, masks: Mapping[int, torch.Tensor], causal: Any = ()) -> None:
    for layer in causal:
        held = dict(model.trf_blocks[layer].att.named_buffers(recurse=False)).get("mask")
        if held is not None:
            held.copy_(torch.ones_like(held).triu(1))
    for layer, mask in masks.items():
        att = model.trf_blocks[layer].att
        like = next(att.parameters())
        att.mask = mask.to(device=like.device, dtype=like.dtype)


def _set_rates(model: Any, sizes: Sizes) -> None:
    """Sets what a config.json has and the book's config has no key for."""
    embedding, attention, shortcut = sizes.drops or (sizes.cfg["drop_rate"],) * 3
    model.drop_emb.p, model.final_norm.eps = embedding, sizes.eps
    for block in model.trf_blocks:
        block.att.dropout.p, block.drop_shortcut.p = attention, shortcut
        block.norm1.eps = block.norm2.eps = sizes.eps
