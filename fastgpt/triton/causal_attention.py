"""Causal attention on a GPU: an online softmax over tiles of keys, nothing of queries x keys in
memory (Dao, arXiv 2307.08691).

The softmax runs in base 2, and each row's log-sum-exp is kept for backward.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton.attention_tiles import (
    LN_2,
    LOG2_E,
    MAX_HEAD_DIM,
    grid,
    head_of,
    keep_scale,
    kept_weights,
    load_rows,
    options,
    store_rows,
)
from fastgpt.triton.causal_attention_backward import causal_attention_backward
from fastgpt.triton.compilation import on_grid
from fastgpt.triton.decode_attention import decode_attention

__all__ = ["MAX_HEAD_DIM", "causal_attention", "causal_attention_backward", "decode_attention"]


@triton.jit
def _forward_tiles(
    acc,  # [BLOCK_M, BLOCK_D], the sum of weights x values so far
    top,  # [BLOCK_M], the largest score so far
    total,  # [BLOCK_M], the sum of the weights so far
    q,
    k_ptr,
    v_ptr,
    rows,
    start,
    end,
    stride_kt,
    stride_vt,
    T,
    S,
    D,
    scale,  # times log2(e)
    drop_p,
    seed,
    first_word,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """Takes the keys from start to end into the online softmax of the queries q."""
    for n0 in range(start, end, BLOCK_N):
        keys = n0 + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, keys, stride_kt, S, D, MASKED, EVEN_D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            seen = keys[None, :] <= rows[:, None] + (S - T)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing but -inf keeps its weights at 0 instead of inf - inf.
        base = tl.where(new_top == float("-inf"), 0.0, new_top * scale)
        weights = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(top * scale - base)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            kept = kept_weights(seed, drop_p, first_word, rows, n0, S, BLOCK_N)
            weights = tl.where(kept, weights, 0.0)
        v = load_rows(v_ptr, keys, stride_vt, S, D, MASKED, EVEN_D, BLOCK_D)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["bounds_ptr", "T", "S", "seed"])
def causal_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # [B, H, T] float32, or None
    bounds_ptr,  # [B + 1] int32, where each sequence begins and the last ends; None if [B, H, T, D]
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    H,
    T,
    S,
    D,
    scale,  # above 0
    drop_p,
    keep_scale,  # 1 / (1 - drop_p)
    seed: tl.int64,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """A program owns BLOCK_M queries of one head; the last queries, with most keys, go first.

    With bounds, the sequences stand one behind another and T is the longest's length.
    """
    tiles = tl.cdiv(T, BLOCK_M)
    tile, bh = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    first_row = tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    q_ptr = head_of(q_ptr, q_strides, bh, H)
    k_ptr = head_of(k_ptr, k_strides, bh, H)
    v_ptr = head_of(v_ptr, v_strides, bh, H)
    out_ptr = head_of(out_ptr, out_strides, bh, H)
    if bounds_ptr is not None:
        first = tl.load(bounds_ptr + bh // H)
        T = tl.load(bounds_ptr + bh // H + 1) - first
        S = T
        if first_row >= T:  # a longer sequence's tile
            return
        q_ptr += first.to(tl.int64) * q_strides[2]
        k_ptr += first.to(tl.int64) * k_strides[2]
        v_ptr += first.to(tl.int64) * v_strides[2]
        out_ptr += first.to(tl.int64) * out_strides[2]
    q = load_rows(q_ptr, rows, q_strides[2], T, D, True, EVEN_D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first_word = bh.to(tl.int64) * T * tl.cdiv(S, 4)
    # Every row of the tile sees the keys before `whole`, none of it those from `end` on.
    whole = (first_row + S - T + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(first_row + BLOCK_M + S - T, S)
    acc, top, total = _forward_tiles(
        acc, top, total, q, k_ptr, v_ptr, rows, 0, whole, k_strides[2], v_strides[2], T, S, D,
        scale * LOG2_E, drop_p, seed, first_word,
        False, DROPOUT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D,
    )  # fmt: skip
    acc, top, total = _forward_tiles(
        acc, top, total, q, k_ptr, v_ptr, rows, whole, end, k_strides[2], v_strides[2], T, S, D,
        scale * LOG2_E, drop_p, seed, first_word,
        True, DROPOUT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D,
    )  # fmt: skip
    factor = 1.0 / total
    if DROPOUT:
        factor *= keep_scale
    store_rows(out_ptr, acc * factor[:, None], rows, out_strides[2], T, D, BLOCK_D)
    if lse_ptr is not None:
        lse = top * scale + tl.log2(total) * LN_2
        tl.store(lse_ptr + bh.to(tl.int64) * T + rows, lse, mask=rows < T)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    packed: tuple[Tensor, int] | None = None,
) -> None:
    """Writes out = dropout(softmax(scale q k^T, causal)) v, and each row of scores' log-sum-exp.

    q, out: [B, H, T, D]; k, v: [B, H, S, D] with S >= T, query i seeing the keys up to i + S - T;
    all of one dtype (float32, float16 or bfloat16), any strides but 1 along D, which is at most
    MAX_HEAD_DIM. lse: [B, H, T] float32, contiguous. seed: from 0 to 2^63 - 1.

    packed: for n sequences that stand one behind another in [1, H, N, D], each to see itself alone:
    where each begins and the last ends, [n + 1] int32 on the same device, and the longest's length;
    neither is checked. Without lse and dropout.
    """
    if out.numel() == 0:
        return
    if scale <= 0:  # the kernel scales after taking the largest score
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    H, T, S, bounds = q.shape[1], q.shape[2], k.shape[2], None
    if packed is not None:
        bounds, T = packed
        q, k, v, out = (t.expand(len(bounds) - 1, -1, -1, -1) for t in (q, k, v, out))
    launch = options("causal_attention_fwd", q, dropout_p)
    on_grid(causal_attention_fwd_kernel, grid(q, T, launch["BLOCK_M"]))(
        q,
        k,
        v,
        out,
        lse,
        bounds,
        q.stride(),
        k.stride(),
        v.stride(),
        out.stride(),
        H,
        T,
        S,
        q.shape[3],
        scale,
        dropout_p,
        keep_scale(dropout_p),
        seed,
        **launch,
    )
