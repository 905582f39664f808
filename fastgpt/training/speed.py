"""How fast a step is, against what the device can do at most."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import torch

from fastgpt.bench import memory
from fastgpt.bench.bound import forward_flops, peak_flops
from fastgpt.bench.rounds import seconds_of
from fastgpt.model.gpt import GPTModel


def flops_per_token(model: GPTModel, context: int) -> float:
    """The floating-point operations of a token's forward and backward pass, only the products, in
    a window of context tokens.
    """
    return 3 * forward_flops(model.cfg, context) / context


def peak(device: torch.device, autocast: contextlib.AbstractContextManager[Any]) -> float:
    """Floating-point operations a second at most: on the CPU those of fused multiply-adds, on
    another device those of a large matrix product by PyTorch. NaN where nothing tells.
    """
    if device.type != "cpu":
        return _product_peak(device, autocast)
    with autocast:
        half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return peak_flops(half or torch.float32) or math.nan


def peak_is(device: torch.device) -> str:
    """What `peak` measures, in words."""
    return "fused multiply-adds" if device.type == "cpu" else "a large product by PyTorch"


@torch.no_grad()
def _product_peak(
    device: torch.device, autocast: contextlib.AbstractContextManager[Any], seconds: float = 0.3
) -> float:
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device)
    best, end = 0.0, time.perf_counter() + seconds
    with autocast:
        while best == 0.0 or time.perf_counter() < end:
            best = max(best, 2 * size**3 / seconds_of(lambda: a @ a, device))
    return best


def memory_used(device: torch.device) -> int:
    """The most bytes held so far: by PyTorch on a GPU, else by the process; 0 if nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory.peak()
