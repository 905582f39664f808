"""What the attention kernels share: rows of a head in and out, dropout's random numbers, and the
constants that a launch is made of.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton import launch_table
from fastgpt.triton.dropout import kept

MAX_HEAD_DIM = launch_table.WIDEST["causal_attention"]
LOG2_E: tl.constexpr = tl.constexpr(1 / math.log(2))
LN_2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def head_of(ptr, strides, bh, H):
    """Where the bh-th of all heads begins in a [B, H, T, D] tensor with these strides."""
    return ptr + (bh // H).to(tl.int64) * strides[0] + (bh % H).to(tl.int64) * strides[1]


@triton.jit
def load_rows(
    ptr,
    rows,
    stride,
    n_rows,
    D,
    MASKED: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Those rows of a [n_rows, D] matrix, zero past D and, where MASKED, past the last row."""
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if MASKED:
        mask = rows[:, None] < n_rows
        if not EVEN_D:
            mask &= cols[None, :] < D
        x = tl.load(ptrs, mask=mask, other=0.0)
    elif EVEN_D:
        x = tl.load(ptrs)
    else:
        x = tl.load(ptrs, mask=cols[None, :] < D, other=0.0)
    return x


@triton.jit
def store_rows(ptr, values, rows, stride, n_rows, D, BLOCK_D: tl.constexpr):
    """Those rows of a [n_rows, D] matrix, from the values [len(rows), BLOCK_D]."""
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    mask = (rows[:, None] < n_rows) & (cols[None, :] < D)
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def kept_weights(seed, drop_p, first_word, rows, n0, S, BLOCK_N: tl.constexpr):
    """Which weights of the tile [rows, n0 .. n0 + BLOCK_N) dropout keeps.

    Key j of row i takes word j % 4 of the Philox call at (row i) * ceil(S / 4) + j // 4, whatever
    the tiles.
    """
    words = first_word + rows.to(tl.int64) * tl.cdiv(S, 4) + n0 // 4
    calls = words[:, None] + tl.arange(0, BLOCK_N // 4)[None, :]
    return kept(seed, calls, drop_p)


def grid(q: Tensor, length: int, block: int) -> tuple[int]:
    """Tiles along each head's sequence; in one dimension, because the others end at 65535."""
    return (triton.cdiv(length, block) * q.shape[0] * q.shape[1],)


def keep_scale(dropout_p: float) -> float:
    """What the weights that dropout keeps are multiplied by."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def options(kernel: str, q: Tensor, dropout_p: float) -> dict[str, Any]:
    """The constants of a kernel and how to launch it."""
    D = q.shape[3]
    block_d = max(16, triton.next_power_of_2(D))
    dropout = dropout_p > 0
    size = "wide" if block_d > 64 or block_d != D else "dropout" if dropout else "narrow"
    return {
        "DROPOUT": dropout,
        "PRECISION": launch_table.precision(q),
        "BLOCK_D": block_d,
        "EVEN_D": block_d == D,
        **launch_table.launch(kernel, q, size),
    }
