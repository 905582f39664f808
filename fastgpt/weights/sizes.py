"""A model's sizes: from the book's config, a config.json and a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastgpt.config import (
    GPT2_SIZES,
    GPT_CONFIG_124M,
    WINDOW,
    check_config,
    check_whole_number,
)
from fastgpt.quantized_weight import check_precision
from fastgpt.weights.names import Shape, Style, WeightsError

_KEYS = tuple(GPT_CONFIG_124M)
# The book's names, and Hugging Face's.
_THEIRS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
# The heads of GPT-2's four sizes, by width and layers: no tensor's shape shows them.
_HEADS = {(c["emb_dim"], c["n_layers"]): c["n_heads"] for c in GPT2_SIZES.values()}
# Hugging Face's loaders refuse ours under this name; else they would draw the weights at random.
_QUANTIZED = "quantization_config"
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh")


class Quantization(NamedTuple):
    """How a model's linear layers hold their weights; the group counts for int4 alone."""

    precision: str
    group: int = 32


@dataclass
class Sizes:
    """What is known of a model besides its tensors.

    Args:
        cfg: the book's config, or the part of it that is known.
        eps: added to the variance in every norm.
        drops: dropout probabilities at the embedding, the attention weights and the shortcuts; None
            if all are the config's drop_rate.
        tied: whether the head is the token embedding; None if only the tensors show it.
        quantization: of the linear layers; None if they are in full precision.
    """

    cfg: dict[str, Any] = field(default_factory=dict)
    eps: float = 1e-5
    drops: tuple[float, float, float] | None = None
    tied: bool | None = None
    quantization: Quantization | None = None


def refused_setting(get: Any, width: int) -> str | None:
    """The first setting of a Hugging Face GPT-2 that the book's model lacks, as 'name value'.

    get(name, default) returns a setting.
    """
    for name, default, right in (
        ("activation_function", "gelu_new", _TANH_GELU),
        ("n_inner", None, (None, 4 * width)),
        ("scale_attn_weights", True, (True,)),
        ("scale_attn_by_inverse_layer_idx", False, (False,)),
        ("add_cross_attention", False, (False,)),
    ):
        value = get(name, default)
        if value not in right:
            return f"{name} {value!r}"
    return None


def from_json(data: Any, label: str) -> Sizes:
    """Reads a config.json, Hugging Face's or the book's config as JSON.

    Raises:
        WeightsError: it is neither, or of a model that differs from the book's.
    """
    if isinstance(data, dict) and "emb_dim" in data:
        _check_whole(data, _THEIRS, label)
        return Sizes({key: data[key] for key in (*_KEYS, WINDOW) if key in data})
    if not isinstance(data, dict) or data.get("model_type", "gpt2") != "gpt2":
        kind = data.get("model_type") if isinstance(data, dict) else type(data).__name__
        raise WeightsError(f"{label}: model_type {kind!r} is not gpt2")
    missing = [name for name in _THEIRS.values() if name not in data]
    if missing:
        raise WeightsError(f"{label} lacks {', '.join(missing)}")
    _check_whole(data, _THEIRS.values(), label)
    refused = refused_setting(data.get, data["n_embd"])
    if refused:
        raise WeightsError(f"{label} has {refused}, which the book's model does not support")
    drops = tuple(data.get(f"{name}_pdrop", 0.1) for name in ("embd", "attn", "resid"))
    eps = data.get("layer_norm_epsilon", 1e-5)
    for value in (*drops, eps):
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise WeightsError(f"{label} has {value!r} where a number from 0 to 1 belongs")
    cfg = {ours: data[theirs] for ours, theirs in _THEIRS.items()}
    cfg["drop_rate"] = drops[2]
    cfg["qkv_bias"] = bool(data.get("qkv_bias", True))
    if WINDOW in data:
        cfg[WINDOW] = data[WINDOW]
    return Sizes(
        cfg,
        float(eps),
        drops,
        bool(data.get("tie_word_embeddings", True)),
        _quantization(data.get(_QUANTIZED), label),
    )


def _check_whole(data: Mapping[str, Any], names: Iterable[str], label: str) -> None:
    for name in names:
        try:
            check_whole_number(name, data.get(name, 1), 0)
        except ValueError as error:
            raise WeightsError(f"{label}: {error}") from None


def _quantization(entry: Any, label: str) -> Quantization | None:
    if entry is None:
        return None
    try:
        found = Quantization(**entry)
        check_precision(*found)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{label} has a {_QUANTIZED} that cannot be read: {error}") from None
    return found


def as_json(sizes: Sizes) -> dict[str, Any]:
    """The config.json for Hugging Face's GPT2LMHeadModel and ``from_json``."""
    assert sizes.drops is not None
    embedding, attention, shortcut = sizes.drops
    end = 50256 if sizes.cfg["vocab_size"] > 50256 else None
    entries: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        # int: a config may have numpy's integers, which JSON does not take.
        **{theirs: int(sizes.cfg[ours]) for ours, theirs in _THEIRS.items()},
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": float(sizes.eps),
        "embd_pdrop": embedding,
        "attn_pdrop": attention,
        "resid_pdrop": shortcut,
        "tie_word_embeddings": sizes.tied,
        "bos_token_id": end,
        "eos_token_id": end,
        # Only ours: Hugging Face's model always has these biases, zero if ours has none.
        "qkv_bias": bool(sizes.cfg["qkv_bias"]),
    }
    if WINDOW in sizes.cfg:
        entries[WINDOW] = sizes.cfg[WINDOW]
    if sizes.quantization:
        entries[_QUANTIZED] = sizes.quantization._asdict()
    return entries


def completed(
    sizes: Sizes, given: Mapping[str, Any] | None, style: Style, shapes: Mapping[str, Shape]
) -> Sizes:
    """The sizes, completed by the caller's config, then by the tensors' shapes.

    Raises:
        WeightsError: the caller's config contradicts the file's, or sizes are still unknown.
    """
    known, given = sizes.cfg, dict(given or {})
    apart = [k for k in _KEYS if k in known and k in given and known[k] != given[k]]
    apart = [key for key in apart if key != "drop_rate"]
    if apart:
        faults = ", ".join(f"{key} is {known[key]!r}, not {given[key]!r}" for key in apart)
        raise WeightsError(f"cfg contradicts the config of these weights: {faults}")
    cfg = _shown(style, shapes) | known | given
    heads = _HEADS.get((cfg.get("emb_dim", 0), cfg.get("n_layers", 0)))
    if "n_heads" not in cfg and heads:
        cfg["n_heads"] = heads
    cfg.setdefault("drop_rate", 0.0)
    missing = [key for key in _KEYS if key not in cfg]
    if missing:
        raise WeightsError(f"these weights have no config: pass cfg with {', '.join(missing)}")
    try:
        check_config(cfg)
    except ValueError as error:
        raise WeightsError(f"the config of these weights is invalid: {error}") from None
    cfg = {key: cfg[key] for key in _KEYS} | cfg
    drops = None if "drop_rate" in given else sizes.drops
    return Sizes(cfg, sizes.eps, drops, sizes.tied, sizes.quantization)


def _shown(style: Style, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What the tensors' names and shapes show."""
    cfg: dict[str, Any] = {"n_layers": style.layers(shapes), "qkv_bias": style.qkv_bias(shapes)}
    tok, pos = shapes.get(style.tok, ()), shapes.get(style.pos, ())
    if len(tok) == 2:
        cfg["vocab_size"], cfg["emb_dim"] = tok
    if len(pos) >= 2:
        cfg["context_length"] = pos[-2]
    return cfg
