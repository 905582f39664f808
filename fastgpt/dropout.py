"""The seeds of the fused dropouts.

A fused dropout keeps no mask: it is a function of a seed and of each element's place
(Philox4x32-10; csrc/dropout.h), made again in backward. The seed is the one number that a call
draws from torch's CPU generator, so masks repeat under ``torch.manual_seed`` and differ from call
to call.
"""

from __future__ import annotations

import torch


def draw_seed(*probabilities: float) -> int:
    """A seed in [0, 2^63) from torch's CPU generator; 0, and nothing drawn, where nothing is
    dropped.

    Raises:
        ValueError: a probability is not in [0, 1].
        RuntimeError: a CUDA graph is being captured, which would repeat one mask for ever.
    """
    for p in probabilities:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout probability {p} must be in [0, 1]")
    if not any(probabilities):
        return 0
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a fused dropout can't be captured in a CUDA graph, its seed is drawn on the host: set "
            'its probability to 0 or capture inside fastgpt.use_backend("reference")'
        )
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


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
