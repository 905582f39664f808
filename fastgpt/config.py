"""Model configs, in the book's form, and checks of configs and token ids."""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch

Config = Mapping[str, Any]

GPT_CONFIG_124M = {
    "vocab_size": 50257,
    "context_length": 1024,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}

# GPT-2's sizes, under the book's names.
GPT2_SIZES: dict[str, dict[str, Any]] = {
    "124M": GPT_CONFIG_124M,
    "355M": GPT_CONFIG_124M | {"emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "774M": GPT_CONFIG_124M | {"emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "1558M": GPT_CONFIG_124M | {"emb_dim": 1600, "n_layers": 48, "n_heads": 25},
}

_KEYS = tuple(GPT_CONFIG_124M)
WINDOW = "kv_window_size"  # a key that a config may have
_LEAST = {"vocab_size": 1, "context_length": 1, "emb_dim": 1, "n_heads": 1, "n_layers": 0}


def check_config(cfg: Config) -> None:
    """Checks a config; extra keys are ignored.

    Raises:
        KeyError: keys are missing; all of them are named.
        ValueError: no model can have this value.
    """
    missing = [key for key in _KEYS if key not in cfg]
    if missing:
        raise KeyError(f"the config lacks {', '.join(missing)} (it needs {', '.join(_KEYS)})")
    for key, least in _LEAST.items():
        check_whole_number(key, cfg[key], least)
    if WINDOW in cfg:
        check_whole_number(WINDOW, cfg[WINDOW], 1)
    if not isinstance(cfg["drop_rate"], Real) or not 0 <= float(cfg["drop_rate"]) <= 1:
        raise ValueError(f"drop_rate {cfg['drop_rate']!r} is not a number from 0 to 1")
    if cfg["emb_dim"] % cfg["n_heads"] != 0:
        raise ValueError(f"emb_dim {cfg['emb_dim']} must be divisible by n_heads {cfg['n_heads']}")


def check_whole_number(name: str, value: Any, least: int) -> None:
    """
    Raises:
        ValueError: the value is not a whole number of at least this.
    """
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} {value!r} is not a whole number of at least {least}")


def in_plain_ints(cfg: Config) -> dict[str, Any]:
    """The config with Python's integers as sizes: numpy's narrow ones overflow in arithmetic."""
    return dict(cfg) | {key: int(cfg[key]) for key in _LEAST}


def as_ids(idx: Any) -> torch.Tensor:
    """Token ids [B, T] as int32 or int64, the dtypes that torch takes as indices.

    Raises:
        TypeError: not a tensor of integers.
        ValueError: not [B, T].
    """
    if not isinstance(idx, torch.Tensor):
        raise TypeError(f"token ids must be a tensor of integers, got {type(idx).__name__}")
    if idx.dtype == torch.bool or idx.is_floating_point() or idx.is_complex():
        raise TypeError(f"token ids must be integers, got {idx.dtype}")
    if idx.dim() != 2:
        way = "; idx[None] makes a batch of one sequence" if idx.dim() == 1 else ""
        raise ValueError(f"token ids must be [batch, tokens], got shape {tuple(idx.shape)}{way}")
    return idx if idx.dtype in (torch.int32, torch.int64) else idx.long()


def as_id_list(ids: Any, what: str) -> list[int]:
    """The token ids of one sequence, a list or a 1-D tensor of integers.

    Raises:
        TypeError: not integers.
        ValueError: not one sequence, or one without a token.
    """
    if not isinstance(ids, torch.Tensor):
        try:
            ids = list(ids)
            ids = torch.tensor(ids, dtype=None if ids else torch.int64, device="cpu")
        except (TypeError, ValueError, RuntimeError):  # RuntimeError: more than 64 bits
            raise TypeError(f"{what} must hold integers of at most 64 bits") from None
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"{what} must hold integers, got {ids.dtype}")
    if ids.dim() != 1:
        raise ValueError(f"{what} must be one sequence of ids, got shape {tuple(ids.shape)}")
    if len(ids) == 0:
        raise ValueError(
            f"{what} holds no token to go on from; <|endoftext|>, 50256 in GPT-2, starts a new text"
        )
    found: list[int] = ids.tolist()
    return found


def comparable(ids: torch.Tensor) -> torch.Tensor:
    """The ids, as int64 if torch cannot compare their dtype."""
    return ids.long() if ids.dtype in (torch.uint16, torch.uint32, torch.uint64) else ids


def check_ids(idx: torch.Tensor, vocab_size: int) -> None:
    """Raises IndexError, which names the id, if an id is outside the vocabulary."""
    if idx.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(idx)).tolist()
    check_range("token id", low, high, vocab_size)


def check_range(name: str, low: int, high: int, vocab_size: int) -> None:
    """Raises IndexError, which names it, if the least or the greatest id is outside the
    vocabulary.
    """
    if low < 0 or high >= vocab_size:
        outside = low if low < 0 else high
        raise IndexError(f"{name} {outside} is outside the vocabulary of {vocab_size}")
