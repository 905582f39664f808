"""A step of cached generation in Triton, one token a row, but for what `linear_rows` and
`decode_attention` do: how it begins, and how queries, keys and values come about.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton import launch_table
from fastgpt.triton.compilation import on_grid
from fastgpt.triton.linear_rows import options, row_products, row_statistics


@triton.jit
def begin_step_kernel(
    ids_ptr,  # [N] int64
    position_ptr,  # [N] int32, moves on
    tok_ptr,  # [vocabulary, width]
    pos_ptr,  # [context, width]
    x_ptr,  # [N, width]
    place_ptr,  # [N] int32
    length_ptr,  # [N] int32
    counters_ptr,  # [n_counters] int32, or None
    vocabulary,
    context,
    width,
    tok_strides,
    pos_strides,
    n_counters,
    BLOCK: tl.constexpr,
):
    # One program owns a row.
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    token, place = tl.load(ids_ptr + row).to(tl.int64), tl.load(position_ptr + row)
    # Outside the tables nothing is read and the row becomes NaN.
    inside = (token >= 0) & (token < vocabulary) & (place >= 0) & (place < context)
    mask = cols < tl.where(inside, width, 0)
    tok_ptr += token * tok_strides[0] + cols.to(tl.int64) * tok_strides[1]
    pos_ptr += place.to(tl.int64) * pos_strides[0] + cols.to(tl.int64) * pos_strides[1]
    tok = tl.load(tok_ptr, mask=mask, other=float("nan")).to(tl.float32)
    pos = tl.load(pos_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * width + cols, tok + pos, mask=cols < width)
    length = tl.minimum(place + 1, context)
    tl.store(place_ptr + row, place)
    tl.store(length_ptr + row, length)
    tl.store(position_ptr + row, tl.where(place > 0, length, 0))
    if counters_ptr is not None:
        for counter in range(row, n_counters, tl.num_programs(0)):
            tl.store(counters_ptr + counter, 0)


def begin_step(
    ids: Tensor,
    position: Tensor,
    tok: Tensor,
    pos: Tensor,
    x: Tensor,
    place: Tensor,
    length: Tensor,
    counters: Tensor | None = None,
) -> None:
    """Writes x = tok[ids] + pos[position], where each token stands and how many tokens its row then
    has; moves the positions on, and sets the counters, any number of int32, to 0.

    A position at the context's end stays there, and so does one at 0; x of what is outside a table
    is NaN. ids: [N] int64; position, place, length: [N] int32; tok: [V, D] and pos: [C, D] of any
    strides; x: [N, D] contiguous, of any floating dtype.
    """
    on_grid(begin_step_kernel, (len(ids),))(
        ids,
        position,
        tok,
        pos,
        x,
        place,
        length,
        counters,
        len(tok),
        *pos.shape,
        tok.stride(),
        pos.stride(),
        0 if counters is None else len(counters),
        BLOCK=triton.next_power_of_2(pos.shape[1]),
        **launch_table.launch("begin_step", tok),
    )


@triton.jit
def query_key_value_tile(
    tile,
    mean,
    rstd,
    x_ptr,
    scale_ptr,
    shift_ptr,
    weights,
    weight_strides,
    biases,
    outs,
    out_strides,
    place_ptr,
    n_rows,
    n_cols,
    depth,
    capacity,
    head_dim,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N columns of all rows of queries, keys or values. The arguments are the kernel's, mean
    and rstd the norm's.
    """
    tiles = tl.cdiv(n_cols, BLOCK_N)
    col = tile % tiles * BLOCK_N
    rows, cols = tl.arange(0, ROWS), col + tl.arange(0, BLOCK_N)
    place = tl.load(place_ptr + rows, mask=rows < n_rows, other=0)[:, None].to(tl.int64)
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    mask = mask & (place >= 0) & (place < capacity)
    for part in tl.static_range(3):
        if tile // tiles == part:
            acc = row_products(
                x_ptr,
                weights[part],
                col,
                n_rows,
                n_cols,
                depth,
                weight_strides[part][0],
                weight_strides[part][1],
                mean,
                rstd,
                scale_ptr,
                shift_ptr,
                None,
                None,
                None,
                PRECISION,
                ROWS,
                BLOCK_N,
                BLOCK_K,
            )
            if biases[part] is not None:
                bias = tl.load(biases[part] + cols, mask=cols < n_cols, other=0.0)
                acc += bias.to(tl.float32)[None, :]
            at = rows[:, None].to(tl.int64) * out_strides[part][0]
            at += (cols // head_dim)[None, :].to(tl.int64) * out_strides[part][1]
            at += place * out_strides[part][2] + (cols % head_dim)[None, :]
            tl.store(outs[part] + at, acc, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def query_key_value_kernel(
    x_ptr,  # [n_rows, depth]
    scale_ptr,  # of the norm in front, [depth]
    shift_ptr,  # like scale
    weights,  # three, each [n_cols, depth]
    weight_strides,
    biases,  # three, each [n_cols] or None
    outs,  # three: the queries [n_rows, H, 1, D], and two caches [n_rows, H, capacity, D]
    out_strides,
    place_ptr,  # [n_rows] int32: where in the caches
    n_rows,
    n_cols,
    depth,
    capacity,
    head_dim,
    eps,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program owns a tile.
    mean, rstd = row_statistics(x_ptr, n_rows, depth, eps, ROWS, BLOCK_K)
    query_key_value_tile(
        tl.program_id(0),
        mean,
        rstd,
        x_ptr,
        scale_ptr,
        shift_ptr,
        weights,
        weight_strides,
        biases,
        outs,
        out_strides,
        place_ptr,
        n_rows,
        n_cols,
        depth,
        capacity,
        head_dim,
        PRECISION,
        ROWS,
        BLOCK_N,
        BLOCK_K,
    )


def query_key_value(
    x: Tensor,
    norm: tuple[Tensor, Tensor, float],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    place: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Writes the queries, keys and values of LayerNorm(x), the latter two into each row of a cache
    at its place there; nothing for a row whose place lies outside.

    x: [N, D] contiguous, at most 16 rows, of any floating dtype; norm: scale and shift, [D]
    contiguous, and eps; weights: three, [D, D] of any strides, biases: three, [D] contiguous or
    None, all of one dtype with q: [N, H, 1, D / H] contiguous, and keys, values: [N, H, capacity,
    D / H] of any strides but 1 along the last. place: [N] int32.
    """
    n_rows, depth = x.shape
    launch = options(list(weights), n_rows)
    # Queries have one place each, whatever the row's.
    strides = ((q.stride(0), q.stride(1), 0), keys.stride()[:3], values.stride()[:3])
    on_grid(query_key_value_kernel, (3 * triton.cdiv(depth, launch["BLOCK_N"]),))(
        x,
        norm[0],
        norm[1],
        tuple(weights),
        tuple(w.stride() for w in weights),
        tuple(biases),
        (q, keys, values),
        strides,
        place,
        n_rows,
        depth,
        depth,
        keys.shape[2],
        q.shape[3],
        norm[2],
        **launch,
    )
