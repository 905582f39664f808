"""Dropout's mask, drawn where it is used and drawn again in the backward pass: never stored.

Philox 4x32, one call for four neighbouring elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(seed, calls, p):
    """Which elements of a tile [M, N] dropout keeps.

    calls: [M, N // 4] int64, the Philox call that serves each four neighbours of a row.
    """
    M: tl.constexpr = calls.shape[0]
    N: tl.constexpr = 4 * calls.shape[1]
    a, b, c, d = tl.rand4x(seed, calls)
    fours = tl.join(tl.join(a, c), tl.join(b, d))  # [M, N // 4, 2, 2]
    return tl.reshape(fours, (M, N)) >= p


@triton.jit
def keep_scale(seed, rows, first_col, n_cols, p, BLOCK: tl.constexpr):
    """What dropout multiplies the tile [rows, first_col .. first_col + BLOCK) of n_cols columns
    by: 1 / (1 - p) or 0, the same whatever the tiles. first_col, BLOCK: multiples of 4.
    """
    calls = rows.to(tl.int64)[:, None] * tl.cdiv(n_cols, 4) + first_col // 4
    calls += tl.arange(0, BLOCK // 4)[None, :]
    return tl.where(kept(seed, calls, p), 1.0 / (1.0 - p), 0.0)
