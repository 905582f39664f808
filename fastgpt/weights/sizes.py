"""A model's sizes: in the book's form, in a config.json, as a checkpoint's tensors show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastgpt.config import GPT2_SIZES, GPT_CONFIG_124M, check_config
from fastgpt.weights.names import Shape, Style, WeightsError

_KEYS = tuple(GPT_CONFIG_124M)
# The book's names, and Hugging Face's for the same.
_THEIRS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
# What no shape tells: the heads of GPT-2's four sizes, by width and layers.
_HEADS = {(c["emb_dim"], c["n_layers"]): c["n_heads"] for c in GPT2_SIZES.values()}
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh")


@dataclass
class Sizes:
    """What is known of a model besides its tensors.

    Args:
        cfg: the book's config, or as much of it as is known.
        eps: added to the variance in every norm.
        drops: probabilities at the embedding, the attention weights and the shortcuts; None where
            the config's drop_rate holds for all.
        tied: whether the head is the token embedding; None where only the tensors tell.
    """

    cfg: dict[str, Any] = field(default_factory=dict)
    eps: float = 1e-5
    drops: tuple[float, float, float] | None = None
    tied: bool | None = None


def refused_setting(get: Any, width: int) -> str | None:
    """The first setting of a Hugging Face GPT-2 that the book's model has not, as 'name value'.

    get(name, default) looks a setting up.
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
        WeightsError: it is neither, or of a model that is not the book's.
    """
    if isinstance(data, dict) and "emb_dim" in data:
        return Sizes({key: data[key] for key in _KEYS if key in data})
    if not isinstance(data, dict) or data.get("model_type", "gpt2") != "gpt2":
        kind = data.get("model_type") if isinstance(data, dict) else type(data).__name__
        raise WeightsError(f"{label}: model_type {kind!r} is not gpt2")
    missing = [name for name in _THEIRS.values() if name not in data]
    if missing:
        raise WeightsError(f"{label} lacks {', '.join(missing)}")
    refused = refused_setting(data.get, data["n_embd"])
    if refused:
        raise WeightsError(f"{label}: the book's model has no {refused}")
    drops = tuple(float(data.get(f"{name}_pdrop", 0.1)) for name in ("embd", "attn", "resid"))
    cfg = {ours: data[theirs] for ours, theirs in _THEIRS.items()}
    cfg["drop_rate"] = drops[2]
    cfg["qkv_bias"] = bool(data.get("qkv_bias", True))
    return Sizes(
        cfg,
        float(data.get("layer_norm_epsilon", 1e-5)),
        drops,  # type: ignore[arg-type]
        bool(data.get("tie_word_embeddings", True)),
    )


def as_json(sizes: Sizes) -> dict[str, Any]:
    """The config.json that Hugging Face's GPT2LMHeadModel, and ``from_json``, read."""
    assert sizes.drops is not None
    embedding, attention, shortcut = sizes.drops
    end = 50256 if sizes.cfg["vocab_size"] > 50256 else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        # numpy's integers, which a config may hold, are not JSON's.
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
        # Not Hugging Face's: its model always has these biases, zero where ours has none.
        "qkv_bias": bool(sizes.cfg["qkv_bias"]),
    }


def completed(
    sizes: Sizes, given: Mapping[str, Any] | None, style: Style, shapes: Mapping[str, Shape]
) -> Sizes:
    """The sizes with what the caller gave, then what the tensors show, for what is not known.

    Raises:
        WeightsError: the caller's config contradicts the file's, or something is still unknown.
    """
    known, given = sizes.cfg, dict(given or {})
    apart = [k for k in _KEYS if k in known and k in given and known[k] != given[k]]
    apart = [key for key in apart if key != "drop_rate"]
    if apart:
        told = ", ".join(f"{key} {known[key]!r} there, {given[key]!r} in cfg" for key in apart)
        raise WeightsError(f"cfg contradicts the config that comes with the weights: {told}")
    cfg = _shown(style, shapes) | known | given
    heads = _HEADS.get((cfg.get("emb_dim", 0), cfg.get("n_layers", 0)))
    if "n_heads" not in cfg and heads:
        cfg["n_heads"] = heads
    cfg.setdefault("drop_rate", 0.0)
    missing = [key for key in _KEYS if key not in cfg]
    if missing:
        raise WeightsError(f"no config comes with the weights: pass cfg with {', '.join(missing)}")
    try:
        check_config(cfg)
    except ValueError as error:
        raise WeightsError(f"the config of these weights makes no model: {error}") from None
    cfg = {key: cfg[key] for key in _KEYS} | cfg
    drops = None if "drop_rate" in given else sizes.drops
    return Sizes(cfg, sizes.eps, drops, sizes.tied)


def _shown(style: Style, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What the tensors' names and shapes tell."""
    cfg: dict[str, Any] = {"n_layers": style.layers(shapes), "qkv_bias": style.qkv_bias(shapes)}
    tok, pos = shapes.get(style.tok, ()), shapes.get(style.pos, ())
    if len(tok) == 2:
        cfg["vocab_size"], cfg["emb_dim"] = tok
    if len(pos) >= 2:
        cfg["context_length"] = pos[-2]
    return cfg
