"""Triton's random numbers in numpy: Philox 4x32 with ten rounds, after Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import numpy as np
import torch

_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def randint(seed, offset):
    """tl.randint(seed, offset) as uint32; offset: an int64 array."""
    offset = offset.astype(np.uint64)
    c0, c1 = offset & _LOW, offset >> _HALF
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (b >> _HALF) ^ c1 ^ np.uint64(k0), b & _LOW
        c2, c3 = (a >> _HALF) ^ c3 ^ np.uint64(k1), a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0.astype(np.uint32)


def rand(seed, offset):
    """tl.rand(seed, offset): float32 in [0, 1)."""
    bits = randint(seed, offset).view(np.int32)
    return np.where(bits < 0, ~bits, bits).astype(np.float32) * np.float32(4.6566127342e-10)


def keep(seed, shape, p):
    """What dropout multiplies a contiguous tensor of this shape by: 1 / (1 - p) or 0, float64."""
    offset = np.arange(np.prod(shape, dtype=np.int64)).reshape(shape)
    kept = torch.from_numpy(rand(seed, offset) >= np.float32(p))
    return kept.double() / (1 - p)
