"""The seeds of the fused dropouts.

A fused dropout keeps no mask: it is a function of a seed and of each element's place
(Philox4x32-10; csrc/dropout.h, triton/dropout.py), made again in backward. Each dropout draws its
seed from torch's generator for the tensors' device, as PyTorch's own does, in the order in which
the modules would run. So one ``torch.manual_seed`` gives the same masks whether operations run
fused as a block or one by one, with gradients or without, and torch.utils.checkpoint, which puts
that generator back, repeats them. Dropout on a GPU leaves the CPU's generator alone, from which a
data loader draws its order.
"""

from __future__ import annotations

import torch

_GAMMA, _64_BITS = 0x9E3779B97F4A7C15, (1 << 64) - 1


def check_probability(p: float) -> None:
    """
    Raises:
        ValueError: p is not in [0, 1].
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability {p} must be in [0, 1]")


def draw_seeds(device: torch.device, *probabilities: float) -> tuple[int, ...]:
    """A seed in [0, 2^63) from torch's generator for the device, for each dropout; 0, and nothing
    drawn, for one that drops nothing.

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
    if device.type == "cuda":
        numbers = _drawn_for_gpu(torch.cuda.default_generators[device.index], wanted)
    else:
        numbers = torch.empty(wanted, dtype=torch.int64, device="cpu").random_().tolist()
    drawn = iter(numbers)
    return tuple(next(drawn) if p > 0 else 0 for p in probabilities)


def draw_seed(device: torch.device, p: float) -> int:
    """``draw_seeds`` for one dropout."""
    return draw_seeds(device, p)[0]


def _drawn_for_gpu(generator: torch.Generator, n: int) -> list[int]:
    """So many numbers in [0, 2^63), and the generator moves on, without the GPU: SplitMix64 (Steele
    et al., OOPSLA 2014) of the generator's seed and offset, which is a multiple of 4.
    """
    offset = generator.get_offset()
    generator.set_offset(offset + 4 * n)
    return [_mixed(generator.initial_seed() + (offset // 4 + i + 1) * _GAMMA) for i in range(n)]


def _mixed(z: int) -> int:
    z &= _64_BITS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _64_BITS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _64_BITS
    return (z ^ (z >> 31)) >> 1


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
