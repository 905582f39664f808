"""The sum of token and position embeddings in Triton, with dropout.

Its gradient uses no atomics, so it repeats bit for bit. The ids are sorted; each program goes along
one tile of the sorted list and writes the sum of each run of equal ids. What a run that crosses
tiles has in each of them is left in partial sums, which a second kernel adds up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton import launch_table
from fastgpt.triton.compilation import on_grid
from fastgpt.triton.dropout import keep_scale


@triton.jit(do_not_specialize=["past", "n_rows", "T", "context", "seed"])
def embedding_fwd_kernel(
    idx_ptr,  # [n_rows] ids, n_rows = B * T
    tok_ptr,  # [vocabulary, width]
    pos_ptr,  # [context, width]
    past,  # a number, or a pointer to one a row of B
    y_ptr,  # [n_rows, width]
    n_rows,
    T,
    vocabulary,
    context,
    width,
    dropout_p,
    seed,
    PAST_ON_DEVICE: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program owns ROWS rows of BLOCK columns.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PAST_ON_DEVICE:
        past = tl.load(past + rows // T, mask=rows < n_rows, other=0)
    ids = tl.load(idx_ptr + rows, mask=rows < n_rows, other=0).to(tl.int64)
    places = (past + rows % T).to(tl.int64)
    # Outside the tables nothing is read and the row becomes NaN.
    inside = (ids >= 0) & (ids < vocabulary) & (places >= 0) & (places < context)
    mask = (rows[:, None] < n_rows) & (cols[None, :] < width)
    read = mask & inside[:, None]
    tok = tl.load(tok_ptr + ids[:, None] * width + cols[None, :], mask=read, other=float("nan"))
    pos = tl.load(pos_ptr + places[:, None] * width + cols[None, :], mask=read, other=0.0)
    y = tok.to(tl.float32) + pos.to(tl.float32)  # [ROWS, BLOCK]
    offset = rows[:, None].to(tl.int64) * width + cols[None, :]
    if DROPOUT:
        y *= keep_scale(seed, rows, tl.program_id(1) * BLOCK, width, dropout_p, BLOCK)
    tl.store(y_ptr + offset, y, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "seed"])
def token_bwd_kernel(
    dy_ptr,  # [n_rows, width]
    sorted_ptr,  # [n_rows] ids in order
    order_ptr,  # [n_rows] int64: the rows of dy in that order
    dtok_ptr,  # [vocabulary, width]
    partial_ptr,  # [tiles, 2, width] float32: of the runs from the left and to the right
    n_rows,
    vocabulary,
    width,
    dropout_p,
    seed,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program owns ROWS places of the sorted list in BLOCK columns.
    tile = tl.program_id(0)
    first = tile * ROWS
    last = tl.minimum(first + ROWS, n_rows) - 1
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    partial_ptr += tile.to(tl.int64) * 2 * width + cols
    head = tl.load(sorted_ptr + first)
    # -1 is no id: the list's own ends are no crossings.
    left = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    acc = tl.zeros([BLOCK], tl.float32)
    for place in range(first, last + 1):
        token = tl.load(sorted_ptr + place)
        following = tl.load(sorted_ptr + place + 1, mask=place + 1 < n_rows, other=-1)
        row = tl.load(order_ptr + place)
        dy = tl.load(dy_ptr + row * width + cols, mask=cols < width, other=0.0).to(tl.float32)
        if DROPOUT:
            rows = row + tl.arange(0, 1)
            scale = keep_scale(seed, rows, tl.program_id(1) * BLOCK, width, dropout_p, BLOCK)
            dy *= tl.reshape(scale, (BLOCK,))
        acc += dy
        ends = (following != token) | (place == last)
        from_left = (token == head) & (head == left)
        to_right = (place == last) & (following == token)
        whole = (from_left | to_right) == 0
        inside = (token >= 0) & (token < vocabulary)
        into = dtok_ptr + token.to(tl.int64) * width + cols
        tl.store(into, acc, mask=cols < tl.where(ends & whole & inside, width, 0))
        tl.store(partial_ptr, acc, mask=cols < tl.where(ends & from_left, width, 0))
        tail = to_right & (from_left == 0)
        tl.store(partial_ptr + width, acc, mask=cols < tl.where(tail, width, 0))
        acc = tl.where(ends, 0.0, acc)


@triton.jit(do_not_specialize=["n_rows"])
def crossing_bwd_kernel(
    partial_ptr,  # [tiles, 2, width] float32
    sorted_ptr,  # [n_rows] ids in order
    dtok_ptr,  # [vocabulary, width]
    n_rows,
    vocabulary,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr = 128,
):
    # One program owns the run that begins in its tile and crosses into the next, in BLOCK columns.
    tile = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tile * ROWS
    token = tl.load(sorted_ptr + first + ROWS - 1)
    head = tl.load(sorted_ptr + first)
    left = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    following = tl.load(sorted_ptr + first + ROWS)
    crosses = ((head != token) | (left != token)) & (following == token)
    crosses &= (token >= 0) & (token < vocabulary)
    inside = cols < tl.where(crosses, width, 0)
    # The tiles behind this one that begin with its id.
    tiles, more = tl.num_programs(0) + 1, 0
    for start in range(tl.where(crosses, tile + 1, tiles), tiles, TILES):
        places = (start + tl.arange(0, TILES)) * ROWS
        ids = tl.load(sorted_ptr + places, mask=places < n_rows, other=-1)
        more += tl.sum((ids == token).to(tl.int32), axis=0)
    partial_ptr += tile.to(tl.int64) * 2 * width + cols
    acc = tl.load(partial_ptr + width, mask=inside, other=0.0)
    for step in range(1, more + 1):
        at = partial_ptr + tl.cast(step, tl.int64) * 2 * width
        acc += tl.load(at, mask=inside, other=0.0)
    tl.store(dtok_ptr + token.to(tl.int64) * width + cols, acc, mask=inside)


@triton.jit(do_not_specialize=["past", "B", "T", "seed"])
def position_bwd_kernel(
    dy_ptr,  # [B, T, width]
    dpos_ptr,  # [context, width]
    past,
    B,
    T,
    width,
    dropout_p,
    seed,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program owns ROWS positions in BLOCK columns.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows[:, None] < T) & (cols[None, :] < width)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    offset = rows[:, None].to(tl.int64) * width + cols[None, :]
    for b in range(B):
        dy = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        if DROPOUT:
            at = b * T + rows
            dy *= keep_scale(seed, at, tl.program_id(1) * BLOCK, width, dropout_p, BLOCK)
        acc += dy
        offset += T * width
    into = dpos_ptr + (past + rows).to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(into, acc, mask=mask)


def embedding(
    idx: Tensor,
    tok: Tensor,
    pos: Tensor,
    past: int | Tensor,
    y: Tensor,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> None:
    """Writes y = dropout(tok[idx] + pos[past + t]).

    idx: [B, T] contiguous, any integer dtype; tok: [V, D], pos: [context, D] and y: [B, T, D]
    contiguous, any floating dtypes. past: how many positions went before, a number or an integer
    tensor [B] on the device, which a captured graph reads again. An id or a position outside its
    table reads nothing and makes its row NaN.
    """
    if y.numel() == 0:
        return
    n_rows, width = idx.numel(), y.shape[-1]
    launch = launch_table.launch("embedding_fwd", y)
    grid = (triton.cdiv(n_rows, launch["ROWS"]), triton.cdiv(width, launch["BLOCK"]))
    on_grid(embedding_fwd_kernel, grid)(
        idx,
        tok,
        pos,
        past,
        y,
        n_rows,
        idx.shape[-1],
        tok.shape[0],
        pos.shape[0],
        width,
        dropout_p,
        seed,
        PAST_ON_DEVICE=isinstance(past, Tensor),
        DROPOUT=dropout_p > 0,
        **launch,
    )


def embedding_backward(
    dy: Tensor,
    idx: Tensor,
    dtok: Tensor | None,
    dpos: Tensor | None,
    past: int,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> None:
    """Writes the whole of dtok and dpos, zero where no token or position was used.

    dy: [B, T, D] contiguous; idx: [B, T] contiguous, an id outside the table counts for nothing;
    dtok: [V, D], dpos: [context, D] contiguous, or None if not wanted.
    """
    dropout = dropout_p > 0
    width, T = dy.shape[-1], idx.shape[-1]
    if dtok is not None:
        dtok.zero_()
    if dpos is not None:
        dpos.zero_()
    if dy.numel() == 0:
        return
    if dtok is not None:
        ids, order = torch.sort(idx.flatten(), stable=True)
        launch = launch_table.launch("token_bwd", dy)
        tiles, across = triton.cdiv(len(ids), launch["ROWS"]), triton.cdiv(width, launch["BLOCK"])
        partial = torch.empty((tiles, 2, width), dtype=torch.float32, device=dy.device)
        on_grid(token_bwd_kernel, (tiles, across))(
            dy,
            ids,
            order,
            dtok,
            partial,
            len(ids),
            len(dtok),
            width,
            dropout_p,
            seed,
            DROPOUT=dropout,
            **launch,
        )
        if tiles > 1:
            on_grid(crossing_bwd_kernel, (tiles - 1, across))(
                partial, ids, dtok, len(ids), len(dtok), width, **launch
            )
    if dpos is not None:
        launch = launch_table.launch("position_bwd", dy)
        grid = (triton.cdiv(T, launch["ROWS"]), triton.cdiv(width, launch["BLOCK"]))
        on_grid(position_bwd_kernel, grid)(
            dy, dpos, past, len(dy), T, width, dropout_p, seed, DROPOUT=dropout, **launch
        )
