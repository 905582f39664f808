"""The seeds of the fused dropouts.

A fused dropout keeps no mask: it is a function of a seed and of each element's place
(Philox4x32-10; csrc/dropout.h, triton/dropout.py), made again in backward. Each dropout draws its
seed from torch's CPU generator, in the order in which the modules would run, so one
``torch.manual_seed`` gives the same masks whether operations run fused as a block or one by one,
with gradients or without, on the CPU or a GPU.
"""

from __future__ import annotations

import torch


def check_probability(p: float) -> None:
    """
    Raises:
        ValueError: p is not in [0, 1].
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability {p} must be in [0, 1]")


def draw_seeds(*probabilities: float) -> tuple[int, ...]:
    """A seed in [0, 2^63) from torch's CPU generator for each dropout; 0, and nothing drawn, for
    one that drops nothing.

    Raises:
        ValueError: a probability is not in [0, 1].
        RuntimeError: a CUDA graph is being captured, which would repeat one mask forever.
    """
    for p in probabilities:
        check_probability(p)
    wanted = sum(p > 0 for p in probabilities)
    if wanted == 0:
        return (0,) * len(probabilities)
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a fused dropout can't be captured in a CUDA graph, its seed is drawn on the host: set "
            'its probability to 0 or capture inside fastgpt.use_backend("reference")'
        )
    drawn = iter(torch.empty(wanted, dtype=torch.int64, device="cpu").random_().tolist())
    return tuple(next(drawn) if p > 0 else 0 for p in probabilities)


def draw_seed(p: float) -> int:
    """``draw_seeds`` for one dropout."""
    return draw_seeds(p)[0]


def refuse_double_backward(p: float) -> None:
    """
    Raises:
        RuntimeError: a second derivative is asked of a fused dropout.
    """
    if p > 0:
        raise RuntimeError(
            "a fused dropout has no second derivative: set its probability to 0 or compute inside "
            'fastgpt.use_backend("reference")'
        )
