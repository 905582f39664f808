"""Philox4x32-10 in numpy (Salmon et al., SC 2011), and the masks that the kernels make of it."""

import numpy as np
import torch

BRANCH, ATTENTION, SHORTCUT1, SHORTCUT2 = range(4)  # the sites of one seed's dropouts


def philox(counter, key):
    """Four words for counter words c0..c3 (arrays that broadcast) and key words k0, k1."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (b >> half) ^ c1 ^ np.uint64(k0), b & low
        c2, c3 = (a >> half) ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def factors(seed, p, site, rows, cols):
    """[rows, cols]: 0 where an element is dropped, else 1 / (1 - p), in float64."""
    column, row = np.arange(cols), np.arange(rows, dtype=np.uint64)[:, None]
    counter = column // 64 * 16 + column % 16
    words = philox(
        (counter, row & np.uint64(0xFFFFFFFF), row >> np.uint64(32), site),
        (seed & 0xFFFFFFFF, seed >> 32),
    )
    word = np.take_along_axis(words, (column % 64 // 16)[None, None, :], 0)[0]
    kept = word >= round(p * 2**32)
    return torch.from_numpy(kept / (1 - p)) if p < 1 else torch.zeros(rows, cols).double()
