"""Attention of one query a sequence over a cache of keys and values, split along the cache; and how
keys and values get there.

Each split writes its own result and log-sum-exp, a second kernel joins them in a fixed order. How
many tokens the cache holds of each sequence is read on the device, and every split takes an equal
share of them, so one CUDA graph serves all lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton import launch_table
from fastgpt.triton.attention_tiles import LOG2_E, head_of
from fastgpt.triton.compilation import on_grid

MAX_SPLITS = 64
# Where the output projection joins them, each of its programs reads all.
JOINED_SPLITS = 8


@triton.jit
def decode_attention_share(
    share,
    q_ptr,
    keys_ptr,
    values_ptr,
    length_ptr,
    out_ptr,
    lse_ptr,
    q_strides,
    keys_strides,
    values_strides,
    out_strides,
    H,
    splits,
    D,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One share of one head's cache. The arguments are the kernel's."""
    split, bh = share % splits, share // splits
    cols = tl.arange(0, BLOCK_D)
    q = tl.load(head_of(q_ptr, q_strides, bh, H) + cols, mask=cols < D, other=0.0)
    q = q.to(tl.float32) * (scale * LOG2_E)
    keys_ptr = head_of(keys_ptr, keys_strides, bh, H)
    values_ptr = head_of(values_ptr, values_strides, bh, H)
    length = tl.load(length_ptr + bh // H)
    size = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    acc = tl.zeros((BLOCK_D,), tl.float32)
    top, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for n0 in range(split * size, tl.minimum(split * size + size, length), BLOCK_N):
        rows = n0 + tl.arange(0, BLOCK_N)
        mask = (rows[:, None] < length) & (cols[None, :] < D)
        at = rows.to(tl.int64)[:, None]
        keys = tl.load(keys_ptr + at * keys_strides[2] + cols[None, :], mask=mask, other=0.0)
        values = tl.load(values_ptr + at * values_strides[2] + cols[None, :], mask=mask, other=0.0)
        scores = tl.sum(keys.to(tl.float32) * q[None, :], 1)
        scores = tl.where(rows < length, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        # A share that has seen nothing but -inf keeps its weights at 0 instead of inf - inf.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * values.to(tl.float32), 0)
        top = new_top
    total = tl.where(total == 0.0, 1.0, total)  # of an empty share, which weighs 0
    out_ptr = head_of(out_ptr, out_strides, bh, H) + split * out_strides[2]
    tl.store(out_ptr + cols, (acc / total).to(out_ptr.dtype.element_ty), mask=cols < D)
    if lse_ptr is not None:
        tl.store(lse_ptr + bh.to(tl.int64) * splits + split, top + tl.log2(total))


@triton.jit(do_not_specialize=["splits"])
def decode_attention_split_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    length_ptr,  # [B] int32: the tokens in the cache, at least 1
    out_ptr,  # the splits' results; with one split the result itself
    lse_ptr,  # [B, H, splits] float32, in base 2; None with one split
    q_strides,
    keys_strides,
    values_strides,
    out_strides,
    H,
    splits,
    D,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns one share of one head's cache."""
    decode_attention_share(
        tl.program_id(0),
        q_ptr,
        keys_ptr,
        values_ptr,
        length_ptr,
        out_ptr,
        lse_ptr,
        q_strides,
        keys_strides,
        values_strides,
        out_strides,
        H,
        splits,
        D,
        scale,
        BLOCK_N,
        BLOCK_D,
    )


@triton.jit(do_not_specialize=["n_splits"])
def decode_attention_join_kernel(
    part_ptr,  # [B, H, n_splits, D] float32
    lse_ptr,  # [B, H, n_splits] float32, in base 2
    out_ptr,
    out_strides,
    H,
    n_splits,
    D,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns one head: the splits' results, weighed by their shares of the softmax."""
    bh = tl.program_id(0).to(tl.int64)
    splits, cols = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + bh * n_splits + splits, mask=splits < n_splits, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, 0))
    mask = (splits[:, None] < n_splits) & (cols[None, :] < D)
    part_ptrs = part_ptr + (bh * n_splits + splits[:, None]) * D + cols[None, :]
    parts = tl.load(part_ptrs, mask=mask, other=0.0)
    out = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    out_ptr = head_of(out_ptr, out_strides, bh, H)
    tl.store(out_ptr + cols, out.to(out_ptr.dtype.element_ty), mask=cols < D)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor, scale: float, out: Tensor
) -> None:
    """Writes out = softmax(scale q k^T) v of one query a head over each sequence's first tokens.

    q, out: [B, H, 1, D]; keys, values: [B, H, capacity, D], all of one dtype (float32, float16 or
    bfloat16) and of any strides but 1 along D; what lies past a sequence's length is never read.
    length: [B] int32 on the same device, from 1 to capacity; it is not checked.
    """
    if out.numel() == 0:
        return
    B, H, _, D = keys.shape
    splits = _splits(keys, MAX_SPLITS)
    if splits == 1:
        _split(q, keys, values, length, scale, out, None)
        return
    part = torch.empty((B, H, splits, D), dtype=torch.float32, device=q.device)
    lse = torch.empty((B, H, splits), dtype=torch.float32, device=q.device)
    _split(q, keys, values, length, scale, part, lse)
    on_grid(decode_attention_join_kernel, (B * H,))(
        part,
        lse,
        out,
        out.stride(),
        H,
        splits,
        D,
        BLOCK_S=triton.next_power_of_2(splits),
        BLOCK_D=padded_width(D),
        **launch_table.launch("decode_attention_join", q),
    )


def decode_attention_in_splits(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """The same attention, its splits not joined: their results [B, splits, H D] and log-sum-exps
    [B, H, splits] in base 2, float32, as ``linear_rows`` joins them; or, of one split, the result
    [B, H D] in q's dtype, and None.
    """
    B, H, _, D = keys.shape
    part, lse = empty_splits(q, keys)
    _split(q, keys, values, length, scale, part.view(B, -1, H, D).transpose(1, 2), lse)
    return part, lse


def empty_splits(q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    """Room for what ``decode_attention_in_splits`` gives."""
    B, H, _, D = keys.shape
    splits = _splits(keys, JOINED_SPLITS)
    if splits == 1:
        return q.new_empty((B, H * D)), None
    part = torch.empty((B, splits, H * D), dtype=torch.float32, device=q.device)
    return part, torch.empty((B, H, splits), dtype=torch.float32, device=q.device)


def padded_width(D: int) -> int:
    """The width of a block that holds a head's."""
    return max(16, triton.next_power_of_2(D))


def _splits(keys: Tensor, most: int) -> int:
    """How many splits of each head fill the GPU."""
    B, H, capacity, _ = keys.shape
    block = launch_table.launch("decode_attention_split", keys)["BLOCK_N"]
    programs = 2 * launch_table.device_of(keys).multiprocessors
    return min(triton.cdiv(programs, B * H), triton.cdiv(capacity, block), most)


def _split(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Writes each split's result into out, [B, H, splits, D]."""
    B, H, splits, D = out.shape
    on_grid(decode_attention_split_kernel, (splits * B * H,))(
        q,
        keys,
        values,
        length,
        out,
        lse,
        q.stride(),
        keys.stride(),
        values.stride(),
        out.stride(),
        H,
        splits,
        D,
        scale,
        BLOCK_D=padded_width(D),
        **launch_table.launch("decode_attention_split", q),
    )


# Positions and rows may begin anywhere in a longer tensor.
@triton.jit(do_not_specialize=["position_ptr", "row_ptr"])
def append_kernel(
    k_ptr,
    v_ptr,
    position_ptr,  # [N] int32
    row_ptr,  # [N] int32
    keys_ptr,
    values_ptr,
    k_strides,
    v_strides,
    keys_strides,
    values_strides,
    capacity,
    H,
    D,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns HEADS heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    position = tl.load(position_ptr + token).to(tl.int64)
    row = tl.load(row_ptr + token).to(tl.int64)
    inside = (position >= 0) & (position < capacity)
    mask = (heads < H) & (cols < tl.where(inside, D, 0))
    k = tl.load(k_ptr + token * k_strides[0] + heads * k_strides[1] + cols, mask=mask)
    v = tl.load(v_ptr + token * v_strides[0] + heads * v_strides[1] + cols, mask=mask)
    keys_ptr += row * keys_strides[0] + position * keys_strides[2]
    values_ptr += row * values_strides[0] + position * values_strides[2]
    tl.store(keys_ptr + heads * keys_strides[1] + cols, k, mask=mask)
    tl.store(values_ptr + heads * values_strides[1] + cols, v, mask=mask)


def append(
    k: Tensor, v: Tensor, position: Tensor, row: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Writes each token's keys and values into its row of a cache, at its position there; nothing
    if the position lies outside.

    k, v: [N, H, D]; keys, values: [rows, H, capacity, D], all of one dtype and of any strides but 1
    along D. position, row: [N] int32 on the same device; the rows are not checked.
    """
    if k.numel() == 0:
        return
    N, H, D = k.shape
    launch = launch_table.launch("cache_append", k)
    on_grid(append_kernel, (N, triton.cdiv(H, launch["HEADS"])))(
        k,
        v,
        position,
        row,
        keys,
        values,
        k.stride(),
        v.stride(),
        keys.stride(),
        values.stride(),
        keys.shape[2],
        H,
        D,
        BLOCK_D=padded_width(D),
        **launch,
    )
