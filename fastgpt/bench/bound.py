"""The bound: the seconds that no code for this machine can beat. It is the time of the fused
multiply-adds in the active instruction set, or of reading memory, both measured here.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastgpt import cpu
from fastgpt.cpu import peak

LEAST_BLOCK, PASSES = 400_000_000, 8  # bytes that are read so many times
PIECE = 1 << 17  # floats
WINDOW = 40  # pieces of a thread: about a millisecond


def machine_peaks(dtype: torch.dtype = torch.float32) -> dict[str, float] | None:
    """`flops`, the floating-point operations a second in this dtype (a multiply-add is two), and
    `bandwidth`, the bytes read from memory a second, on as many threads as torch uses.

    None without the C++ extension, or if no kernel measures the dtype.
    """
    flops, bandwidth = peak_flops(dtype), read_bandwidth()
    if flops is None or bandwidth is None:
        return None
    return {"flops": flops, "bandwidth": bandwidth}


def bound_seconds(flops: float, read: float, dtype: torch.dtype = torch.float32) -> float | None:
    """The least seconds for so many operations on so many bytes, each read once; None if
    `machine_peaks` is None.
    """
    peaks = machine_peaks(dtype)
    return None if peaks is None else least_seconds(peaks, flops, read)


def least_seconds(peaks: dict[str, float], flops: float, read: float) -> float:
    """The same for a machine of these peaks."""
    return max(flops / peaks["flops"], read / peaks["bandwidth"])


def peak_flops(dtype: torch.dtype = torch.float32) -> float | None:
    """`flops` of `machine_peaks`, measured without a block of memory."""
    isa = cpu.isa()
    if isa is None or dtype not in peak.DTYPES:
        return None
    return _flops(torch.get_num_threads(), isa)


def read_bandwidth() -> float | None:
    """`bandwidth` of `machine_peaks`."""
    isa = cpu.isa()
    return None if isa is None else _bandwidth(torch.get_num_threads(), isa)


def forward_flops(
    cfg: dict[str, Any], tokens: int, past: int = 0, head_rows: int | None = None
) -> float:
    """The floating-point operations of one sequence's forward pass in its matrix products: linear
    layers and causal attention. The backward pass takes twice as many.

    Args:
        tokens: how many are fed, after `past` tokens whose keys and values are cached.
        head_rows: how many tokens get logits; None for all.
    """
    width, layers = cfg["emb_dim"], cfg["n_layers"]
    linear = 12 * layers * width**2 * tokens
    head = cfg["vocab_size"] * width * (tokens if head_rows is None else head_rows)
    # A token sees itself and all before it: half the window on average.
    seen = tokens * (past + (tokens + 1) / 2)
    return 2 * (linear + head) + layers * 2 * 2 * width * seen


def generation_flops(cfg: dict[str, Any], tokens: int, new: int) -> list[float]:
    """The operations of each pass that one sequence's new tokens take, the prompt's first."""
    steps = (forward_flops(cfg, 1, tokens + n) for n in range(new - 1))
    return [forward_flops(cfg, tokens, head_rows=1), *steps]


def weight_bytes(cfg: dict[str, Any]) -> int:
    """The bytes of all linear layers' weights in float32, which every pass has to read."""
    width = cfg["emb_dim"]
    return 4 * (12 * cfg["n_layers"] * width**2 + cfg["vocab_size"] * width)


@lru_cache
def _flops(threads: int, isa: str) -> float:
    ends = _ends(10_000 * threads)  # a piece takes some 10 us
    operations = peak.multiply_adds(ends, threads)
    return operations * _best_rate(ends)


@lru_cache
def _bandwidth(threads: int, isa: str) -> float:
    size = max(LEAST_BLOCK, 8 * _last_level_cache()) // 4 // PIECE * PIECE
    block = torch.ones(size)  # written: all untouched pages are one
    ends = _ends(PASSES * size // PIECE)
    peak.read(block, PIECE, ends, threads)
    return 4 * PIECE * _best_rate(ends)


def _ends(pieces: int) -> Tensor:
    """For each piece, when it was done and by which thread."""
    return torch.empty(pieces, 2, dtype=torch.float64)


def _best_rate(ends: Tensor) -> float:
    """Pieces a second: the sum of each thread's fastest stretch."""
    total = 0.0
    for thread in ends[:, 1].unique():
        times = ends[ends[:, 1] == thread, 0]
        if len(times) > WINDOW:
            total += WINDOW / (times[WINDOW:] - times[:-WINDOW]).min().item()
    return total


def _last_level_cache() -> int:
    """Bytes; 0 if the system does not tell."""
    name = "SC_LEVEL3_CACHE_SIZE"
    known = name in getattr(os, "sysconf_names", ())
    return max(0, os.sysconf(name)) if known else 0
