"""How fast a training step is, compared with the device's peak."""

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
    """Floating-point operations of the matrix products per token, forward and backward."""
    return 3 * forward_flops(model.cfg, context) / context


def peak(device: torch.device, autocast: contextlib.AbstractContextManager[Any]) -> float:
    """The device's peak in floating-point operations per second; NaN if it is unknown.

    On the CPU that of fused multiply-adds, elsewhere that of a large matrix product by PyTorch.
    """
    if device.type != "cpu":
        return _product_peak(device, autocast)
    with autocast:
        half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return peak_flops(half or torch.float32) or math.nan


def peak_is(device: torch.device) -> str:
    """What `peak` measures, for the user."""
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
    """Peak bytes so far: PyTorch's on a GPU, else the process's; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory.peak()
