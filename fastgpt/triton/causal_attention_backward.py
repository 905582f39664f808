"""The gradients of causal attention, from each row's log-sum-exp that forward kept.

One kernel owns tiles of queries and writes dq, a second owns tiles of keys and writes dk and dv;
each makes the weights, and dropout's random numbers, again. Nothing is added atomically, so the
same call gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton.attention_tiles import (
    LOG2_E,
    grid,
    head_of,
    keep_scale,
    kept_weights,
    load_rows,
    options,
    store_rows,
)
from fastgpt.triton.compilation import on_grid


@triton.jit
def _query_gradient_tiles(
    dq,  # [BLOCK_M, BLOCK_D], the sum so far, without the scale
    q,
    dout,
    lse,  # [BLOCK_M]
    delta,  # [BLOCK_M]
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
    scale,
    drop_p,
    keep_scale,
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
    for n0 in range(start, end, BLOCK_N):
        keys = n0 + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, keys, stride_kt, S, D, MASKED, EVEN_D, BLOCK_D)
        v = load_rows(v_ptr, keys, stride_vt, S, D, MASKED, EVEN_D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        weights = tl.exp2((scores * scale - lse[:, None]) * LOG2_E)
        if MASKED:
            weights = tl.where(keys[None, :] <= rows[:, None] + (S - T), weights, 0.0)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            kept = kept_weights(seed, drop_p, first_word, rows, n0, S, BLOCK_N)
            dweights = tl.where(kept, dweights * keep_scale, 0.0)
        if MASKED and q.dtype == tl.float32:
            # The gradients of a row's scores add up to 0. Where the row sees no other tile, what is
            # left of their sum is delta's error.
            alone = (n0 == 0) & (rows + (S - T) < BLOCK_N)
            left = tl.sum(weights * (dweights - delta[:, None]), 1)
            delta += tl.where(alone, left, 0.0)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, delta


@triton.jit(do_not_specialize=["T", "S", "seed"])
def causal_attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,  # [B, H, T] float32
    delta_ptr,  # [B, H, T] float32, written: the sum of weights x their gradients
    dq_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    dout_strides,
    dq_strides,
    H,
    T,
    S,
    D,
    scale,
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
    """A program owns BLOCK_M queries of one head; the last queries, with most keys, go first."""
    tiles = tl.cdiv(T, BLOCK_M)
    tile, bh = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    first_row = tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    out_ptr = head_of(out_ptr, out_strides, bh, H)
    dout_ptr = head_of(dout_ptr, dout_strides, bh, H)
    out = load_rows(out_ptr, rows, out_strides[2], T, D, True, EVEN_D, BLOCK_D).to(tl.float32)
    dout = load_rows(dout_ptr, rows, dout_strides[2], T, D, True, EVEN_D, BLOCK_D)
    delta = tl.sum(out * dout.to(tl.float32), 1)
    statistics = bh.to(tl.int64) * T + rows
    lse = tl.load(lse_ptr + statistics, mask=rows < T, other=float("inf"))
    q_ptr = head_of(q_ptr, q_strides, bh, H)
    k_ptr = head_of(k_ptr, k_strides, bh, H)
    v_ptr = head_of(v_ptr, v_strides, bh, H)
    q = load_rows(q_ptr, rows, q_strides[2], T, D, True, EVEN_D, BLOCK_D)
    first_word = bh.to(tl.int64) * T * tl.cdiv(S, 4)
    whole = (first_row + S - T + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(first_row + BLOCK_M + S - T, S)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq, delta = _query_gradient_tiles(
        dq, q, dout, lse, delta, k_ptr, v_ptr, rows, 0, whole,
        k_strides[2], v_strides[2], T, S, D, scale, drop_p, keep_scale, seed, first_word,
        False, DROPOUT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D,
    )  # fmt: skip
    dq, delta = _query_gradient_tiles(
        dq, q, dout, lse, delta, k_ptr, v_ptr, rows, whole, end,
        k_strides[2], v_strides[2], T, S, D, scale, drop_p, keep_scale, seed, first_word,
        True, DROPOUT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D,
    )  # fmt: skip
    dq_ptr = head_of(dq_ptr, dq_strides, bh, H)
    store_rows(dq_ptr, dq * scale, rows, dq_strides[2], T, D, BLOCK_D)
    tl.store(delta_ptr + statistics, delta, mask=rows < T)


@triton.jit
def _key_gradient_tiles(
    dk,  # [BLOCK_N, BLOCK_D], the sum so far, without the scale
    dv,  # [BLOCK_N, BLOCK_D], the sum so far, without dropout's 1 / (1 - p)
    k,
    v,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    n0,
    start,
    end,
    stride_qt,
    stride_dot,
    T,
    S,
    D,
    scale,
    drop_p,
    keep_scale,
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
    """Takes the queries from start to end into the gradients of the keys from n0 on.

    The scores lie transposed, so that they go into the sums' products from registers.
    """
    keys = n0 + tl.arange(0, BLOCK_N)
    for m0 in range(start, end, BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, rows, stride_qt, T, D, True, EVEN_D, BLOCK_D)
        dout = load_rows(dout_ptr, rows, stride_dot, T, D, True, EVEN_D, BLOCK_D)
        # Past the last query the weights become 0.
        lse = tl.load(lse_ptr + rows, mask=rows < T, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rows < T, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        weights = tl.exp2((scores * scale - lse[None, :]) * LOG2_E)
        if MASKED:
            weights = tl.where(keys[:, None] <= rows[None, :] + (S - T), weights, 0.0)
        dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dropped = weights
        if DROPOUT:
            kept = kept_weights(seed, drop_p, first_word, rows, n0, S, BLOCK_N)
            kept = tl.trans(kept)
            dropped = tl.where(kept, weights, 0.0)
            dweights = tl.where(kept, dweights * keep_scale, 0.0)
        dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dscores = weights * (dweights - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "S", "seed"])
def causal_attention_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,  # [B, H, T] float32
    delta_ptr,  # [B, H, T] float32
    dk_ptr,
    dv_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dk_strides,
    dv_strides,
    H,
    T,
    S,
    D,
    scale,
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
    """A program owns BLOCK_N keys of one head; the first keys, which most queries see, go first."""
    tiles = tl.cdiv(S, BLOCK_N)
    n0, bh = tl.program_id(0) % tiles * BLOCK_N, tl.program_id(0) // tiles
    keys = n0 + tl.arange(0, BLOCK_N)
    q_ptr = head_of(q_ptr, q_strides, bh, H)
    dout_ptr = head_of(dout_ptr, dout_strides, bh, H)
    k_ptr = head_of(k_ptr, k_strides, bh, H)
    v_ptr = head_of(v_ptr, v_strides, bh, H)
    lse_ptr += bh.to(tl.int64) * T
    delta_ptr += bh.to(tl.int64) * T
    k = load_rows(k_ptr, keys, k_strides[2], S, D, True, EVEN_D, BLOCK_D)
    v = load_rows(v_ptr, keys, v_strides[2], S, D, True, EVEN_D, BLOCK_D)
    first_word = bh.to(tl.int64) * T * tl.cdiv(S, 4)
    # The first query that sees one of these keys, and the first tile of queries that see them all.
    first = tl.maximum(n0 - (S - T), 0)
    diagonal = tl.maximum(tl.minimum(n0 + BLOCK_N - 1 - (S - T), T), first)
    whole = first + tl.cdiv(diagonal - first, BLOCK_M) * BLOCK_M
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dk, dv = _key_gradient_tiles(
        dk, dk, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, n0, first, whole,
        q_strides[2], dout_strides[2], T, S, D, scale, drop_p, keep_scale, seed, first_word,
        True, DROPOUT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D,
    )  # fmt: skip
    dk, dv = _key_gradient_tiles(
        dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, n0, whole, T,
        q_strides[2], dout_strides[2], T, S, D, scale, drop_p, keep_scale, seed, first_word,
        False, DROPOUT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D,
    )  # fmt: skip
    if DROPOUT:
        dv *= keep_scale
    dk_ptr = head_of(dk_ptr, dk_strides, bh, H)
    dv_ptr = head_of(dv_ptr, dv_strides, bh, H)
    store_rows(dk_ptr, dk * scale, keys, dk_strides[2], S, D, BLOCK_D)
    store_rows(dv_ptr, dv, keys, dv_strides[2], S, D, BLOCK_D)


def causal_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> None:
    """Writes the gradients of q, k and v from that of out, and from what forward wrote.

    dout, dq: like q; dk, dv: like k; any strides but 1 along D. dropout_p, seed: forward's.
    """
    if out.numel() == 0:  # no query, or no head dimension
        dk.zero_()
        dv.zero_()
        return
    H, T, S = q.shape[1], q.shape[2], k.shape[2]
    delta = torch.empty_like(lse)
    scalars = (H, T, S, q.shape[3], scale, dropout_p, keep_scale(dropout_p), seed)
    launch = options("causal_attention_bwd_dq", q, dropout_p)
    on_grid(causal_attention_bwd_dq_kernel, grid(q, T, launch["BLOCK_M"]))(
        q,
        k,
        v,
        out,
        dout,
        lse,
        delta,
        dq,
        q.stride(),
        k.stride(),
        v.stride(),
        out.stride(),
        dout.stride(),
        dq.stride(),
        *scalars,
        **launch,
    )
    launch = options("causal_attention_bwd_dkdv", q, dropout_p)
    on_grid(causal_attention_bwd_dkdv_kernel, grid(q, S, launch["BLOCK_N"]))(
        q,
        k,
        v,
        dout,
        lse,
        delta,
        dk,
        dv,
        q.stride(),
        k.stride(),
        v.stride(),
        dout.stride(),
        dk.stride(),
        dv.stride(),
        *scalars,
        **launch,
    )
