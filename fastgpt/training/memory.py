"""Whether a training step can fit into memory, checked before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgpt.training.settings import SettingsError

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
KEPT = 10  # numbers that a block keeps per token for backward, in multiples of the width


def check_memory(
    cfg: Mapping[str, Any],
    windows: int,
    device: torch.device,
    *,
    bfloat16: bool,
    tied: bool,
    shards: int = 1,
    beside: int = 1,
) -> None:
    """Checks that a step can fit into the memory that is available.

    Args:
        cfg: the model's config, in the book's form.
        windows: per pass of a process.
        device: to train on.
        bfloat16: whether products run in bfloat16.
        tied: whether the head may be the token embedding.
        shards: processes that share the weights.
        beside: processes that share this device's memory.

    Raises:
        SettingsError: the least that a step needs is more than is available.
    """
    needed = beside * least_bytes(cfg, windows, bfloat16=bfloat16, tied=tied, shards=shards)
    available = available_bytes(device)
    if available is not None and needed > available:
        needed = min(needed, 10**30)  # a larger one may be no float
        raise SettingsError(
            f"a step needs at least {needed / 1e9:,.1f} GB of memory, but "
            f"{available / 1e9:,.1f} GB are available: choose a smaller --micro-batch, "
            "--batch, --context or --config"
        )


def least_bytes(
    cfg: Mapping[str, Any], windows: int, *, bfloat16: bool, tied: bool, shards: int = 1
) -> int:
    """The least memory of a step: weights and AdamW's two moments in float32, and what the blocks
    keep for backward (at its start) or the gradients (at its end), whichever is more.
    """
    width, layers, context = (cfg[key] for key in ("emb_dim", "n_layers", "context_length"))
    tables = context + cfg["vocab_size"] * (1 if tied else 2)
    parameters = tables * width + layers * 12 * width**2
    kept = (2 if bfloat16 else 4) * windows * context * layers * KEPT * width
    return 12 * parameters // shards + max(kept, 4 * parameters // shards)


def available_bytes(device: torch.device) -> int | None:
    """Free memory, or the machine's memory if only that is known; None if neither is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * sum(int(fields[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (OSError, ValueError, KeyError):  # not Linux
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):  # Windows
            return None
    return min([free, *filter(None, map(_limit, LIMITS))])


def _limit(path: str) -> int | None:
    """A container's memory limit; None if there is none (the file then says "max")."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None
