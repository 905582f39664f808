"""Philox4x32-10 in numpy (Salmon et al., SC 2011), Triton's random numbers, and the masks that the
kernels make of them.
"""

import numpy as np
import torch

_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter, key):
    """Four words for counter words c0..c3 (arrays that broadcast) and key words k0, k1."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (b >> _HALF) ^ c1 ^ np.uint64(k0), b & _LOW
        c2, c3 = (a >> _HALF) ^ c3 ^ np.uint64(k1), a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def randint4x(seed, offset):
    """tl.randint4x(seed, offset) as four uint32 arrays; offset: an int64 array."""
    offset = offset.astype(np.uint64)
    return philox((offset & _LOW, offset >> _HALF, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))


def rand4x(seed, offset):
    """tl.rand4x(seed, offset): four float32 arrays in [0, 1)."""
    words = (bits.view(np.int32) for bits in randint4x(seed, offset))
    scale = np.float32(4.6566127342e-10)
    return tuple(np.where(x < 0, ~x, x).astype(np.float32) * scale for x in words)


def rand(seed, offset):
    """tl.rand(seed, offset): float32 in [0, 1)."""
    return rand4x(seed, offset)[0]


def keep(seed, shape, p):
    """What dropout multiplies a tensor of this shape by: 1 / (1 - p) or 0, float64. A Philox call
    serves four neighbours of a row.
    """
    *rows, width = shape
    calls = np.arange(np.prod(rows, dtype=np.int64) * -(-width // 4)).reshape(*rows, -1)
    drawn = np.stack(rand4x(seed, calls), axis=-1).reshape(*rows, -1)[..., :width]
    kept = torch.from_numpy(drawn >= np.float32(p)).double()
    return kept / (1 - p) if p < 1 else kept
