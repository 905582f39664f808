"""A layer's step of cached generation in Triton as one launch, in place of the five of
`decode_step`, `decode_attention` and `linear_rows`, whose tiles it computes.

As many programs as the GPU holds at once walk over the tiles of one phase after another. Between
two phases all wait for all at a barrier, so the launch is a cooperative one: the driver refuses it
where a program would have to wait for another's place.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton import launch_table
from fastgpt.triton.compilation import on_grid
from fastgpt.triton.decode_attention import decode_attention_share, padded_width
from fastgpt.triton.decode_step import query_key_value_tile
from fastgpt.triton.linear_rows import linear_rows_tile, options, row_statistics

PHASES = 5


@triton.jit
def grid_barrier(counter_ptr, arrivals):
    """Counts this program and waits until so many are counted. What any of them wrote before, all
    of them read after.
    """
    tl.debug_barrier()  # all threads have written before one of them counts
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def _product(
    x_ptr,
    norm,
    lse_ptr,
    weight_ptr,
    strides,
    bias_ptr,
    residual_ptr,
    y_ptr,
    n_rows,
    n_cols,
    depth,
    splits,
    head_dim,
    eps,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """This program's tiles of what `linear_rows` computes."""
    mean, rstd = None, None
    if norm[0] is not None:
        mean, rstd = row_statistics(x_ptr, n_rows, depth, eps, ROWS, BLOCK_K)
    for tile in range(tl.program_id(0), tl.cdiv(n_cols, BLOCK_N), tl.num_programs(0)):
        linear_rows_tile(
            tile,
            mean,
            rstd,
            x_ptr,
            norm[0],
            norm[1],
            lse_ptr,
            weight_ptr,
            bias_ptr,
            residual_ptr,
            y_ptr,
            None,
            n_rows,
            n_cols,
            depth,
            strides[0],
            strides[1],
            splits,
            head_dim,
            GELU,
            PRECISION,
            ROWS,
            BLOCK_N,
            BLOCK_K,
        )


# A counter may begin anywhere in a longer tensor.
@triton.jit(do_not_specialize=["counter_ptr", "n_rows", "splits"])
def decode_layer_kernel(
    x_ptr,  # [n_rows, width] float32
    norms,  # two, each scale and shift, [width]
    weights,  # six: queries', keys', values', the output projection's, and the feed-forward's two
    strides,  # of the weights
    biases,  # six, or None
    caches,  # keys and values, [n_rows, H, capacity, D]
    cache_strides,
    place_ptr,  # [n_rows] int32: where in the caches
    length_ptr,  # [n_rows] int32: how many tokens they then hold
    q_ptr,  # [n_rows, H, 1, D]; this and the next three lie between two phases
    part_ptr,  # float32 [n_rows, splits, width]; with one split like q
    lse_ptr,  # float32 [n_rows, H, splits]; None with one split
    hidden_ptr,  # [n_rows, hidden]
    counter_ptr,  # [1] int32, 0
    n_rows,
    width,
    hidden,
    capacity,
    H,
    D,
    splits,
    scale,
    eps,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    # Of each phase a program owns a tile in so many as there are programs.
    first, programs = tl.program_id(0), tl.num_programs(0)
    for phase in tl.static_range(FIRST, LAST + 1):
        if phase > FIRST:
            grid_barrier(counter_ptr, (phase - FIRST) * programs)
        if phase == 0:
            mean, rstd = row_statistics(x_ptr, n_rows, width, eps, ROWS, BLOCK_K)
            for tile in range(first, 3 * tl.cdiv(width, BLOCK_N), programs):
                query_key_value_tile(
                    tile,
                    mean,
                    rstd,
                    x_ptr,
                    norms[0][0],
                    norms[0][1],
                    weights,
                    strides,
                    biases,
                    (q_ptr, caches[0], caches[1]),
                    ((width, D, 0), cache_strides[0], cache_strides[1]),
                    place_ptr,
                    n_rows,
                    width,
                    width,
                    capacity,
                    D,
                    PRECISION,
                    ROWS,
                    BLOCK_N,
                    BLOCK_K,
                )
        elif phase == 1:
            for share in range(first, splits * n_rows * H, programs):
                decode_attention_share(
                    share,
                    q_ptr,
                    caches[0],
                    caches[1],
                    length_ptr,
                    part_ptr,
                    lse_ptr,
                    (width, D),
                    cache_strides[0],
                    cache_strides[1],
                    (splits * width, D, width),
                    H,
                    splits,
                    D,
                    scale,
                    BLOCK_S,
                    BLOCK_D,
                )
        elif phase == 2:
            _product(
                part_ptr,
                (None, None),
                lse_ptr,
                weights[3],
                strides[3],
                biases[3],
                x_ptr,
                x_ptr,
                n_rows,
                width,
                width,
                splits,
                D,
                eps,
                False,
                PRECISION,
                ROWS,
                BLOCK_N,
                BLOCK_K,
            )
        elif phase == 3:
            _product(
                x_ptr,
                norms[1],
                None,
                weights[4],
                strides[4],
                biases[4],
                None,
                hidden_ptr,
                n_rows,
                hidden,
                width,
                1,
                1,
                eps,
                True,
                PRECISION,
                ROWS,
                BLOCK_N,
                BLOCK_K,
            )
        else:
            _product(
                hidden_ptr,
                (None, None),
                None,
                weights[5],
                strides[5],
                biases[5],
                x_ptr,
                x_ptr,
                n_rows,
                width,
                hidden,
                1,
                1,
                eps,
                False,
                PRECISION,
                ROWS,
                BLOCK_N,
                BLOCK_K,
            )


def decode_layer(
    x: Tensor,
    norms: Sequence[tuple[Tensor, Tensor]],
    linears: Sequence[tuple[Tensor, Tensor | None]],
    eps: float,
    place: Tensor,
    length: Tensor,
    keys: Tensor,
    values: Tensor,
    between: tuple[Tensor, Tensor, Tensor | None, Tensor],
    counter: Tensor,
    phases: tuple[int, int] = (0, PHASES - 1),
) -> None:
    """Writes a layer's output over its input x, and its keys and values into the caches, as
    ``query_key_value``, ``decode_attention_in_splits`` and ``linear_rows`` do one after another.

    x: [N, W] float32, contiguous, at most 16 rows; norms: two, scale and shift, [W] contiguous;
    linears: six, weights [W, W] but the fifth's [F, W] and the sixth's [W, F], of any strides, and
    biases, contiguous or None; keys, values: [N, H, capacity, D] of any strides but 1 along the
    last, all of one dtype. place, length: [N] int32. between: room for queries [N, H, 1, D],
    ``empty_splits`` of these and the hidden layer [N, F]. counter: [1] int32, which holds 0 and is
    the launch's own. phases: the first and the last that run, fewer in tests.
    """
    n_rows, width = x.shape
    weights, biases = zip(*linears, strict=True)
    q, part, lse, hidden = between
    _, H, capacity, D = keys.shape
    tiles = options(list(weights), n_rows)
    launch = {**tiles, **launch_table.launch("decode_layer", weights[0], tiles["ROWS"])}
    programs = launch.pop("PROGRAMS") * launch_table.device_of(x).multiprocessors
    on_grid(decode_layer_kernel, (programs,))(
        x,
        tuple(map(tuple, norms)),
        weights,
        tuple(weight.stride() for weight in weights),
        biases,
        (keys, values),
        (keys.stride()[:3], values.stride()[:3]),
        place,
        length,
        q,
        part,
        lse,
        hidden,
        counter,
        n_rows,
        width,
        hidden.shape[1],
        capacity,
        H,
        D,
        1 if lse is None else lse.shape[2],
        D**-0.5,
        eps,
        BLOCK_S=launch_table.launch("decode_attention_split", q)["BLOCK_N"],
        BLOCK_D=padded_width(D),
        FIRST=phases[0],
        LAST=phases[1],
        launch_cooperative_grid=True,
        **launch,
    )
