"""Model sizes, in the book's form."""

from collections.abc import Mapping
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

_KEYS = tuple(GPT_CONFIG_124M)


def check_config(cfg: Config) -> None:
    """Raises KeyError for a missing key and ValueError for sizes that make no model; ignores extra
    keys.
    """
    missing = [key for key in _KEYS if key not in cfg]
    if missing:
        raise KeyError(f"the config lacks {', '.join(missing)} (it needs {', '.join(_KEYS)})")
    if cfg["n_heads"] <= 0 or cfg["emb_dim"] % cfg["n_heads"] != 0:
        raise ValueError(f"emb_dim {cfg['emb_dim']} must be divisible by n_heads {cfg['n_heads']}")


def check_ids(idx: torch.Tensor, vocab_size: int) -> None:
    """Raises IndexError naming an id that is outside the vocabulary."""
    if idx.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(idx)).tolist()
    if low < 0 or high >= vocab_size:
        outside = low if low < 0 else high
        raise IndexError(f"token id {outside} is outside the vocabulary of {vocab_size}")
