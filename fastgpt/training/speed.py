"""How fast a step is, against what the device's matrix products reach."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import torch
from torch import nn

from fastgpt.model import GPTModel


def flops_per_token(model: GPTModel, context: int) -> float:
    """The floating-point operations of a token's forward and backward pass, only the products:
    linear layers, and causal attention over a window of context tokens.
    """
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    width, layers = model.cfg["emb_dim"], len(model.trf_blocks)
    # Scores and weighted values: 2 operations a key each, over half the window on average.
    attention = layers * 2 * 2 * width * context / 2
    return 3 * (2 * linear + attention)


@torch.no_grad()
def matmul_peak(
    device: torch.device, autocast: contextlib.AbstractContextManager[Any], seconds: float = 0.3
) -> float:
    """Floating-point operations a second in a large matrix product, the best of some seconds."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device)
    best, end = 0.0, time.perf_counter() + seconds
    with autocast:
        while best == 0.0 or time.perf_counter() < end:
            _wait(device)
            start = time.perf_counter()
            a @ a
            _wait(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def memory_used(device: torch.device) -> int:
    """The most bytes held so far: by PyTorch on a GPU, else by the process; 0 if nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
