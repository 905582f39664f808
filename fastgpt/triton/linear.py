"""The product with a weight matrix in Triton, with bias and tanh GELU in its epilogue.

Three forms: at most 16 rows read the weight once, at the memory's bandwidth; on Hopper and newer,
16-bit tiles come by the tensor memory accelerator (TMA) into programs that stay for many tiles; all
else goes through pointers, a program a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.triton import launch_table
from fastgpt.triton.gelu import gelu as gelu_of

SMALL = 16  # rows
_TMA_ARCHS = ("sm_90", "sm_100", "sm_103")


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """A tile's row and column, in groups of GROUP_M rows: neighbours share what they read."""
    group = tile // (GROUP_M * tiles_n)
    within = tile % (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % height, within // height


@triton.jit
def _halves(acc):
    """The left and the right half of a tile."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    return tl.split(tl.permute(tl.reshape(acc, [M, 2, N // 2]), [0, 2, 1]))


@triton.jit
def finish_part(acc, row, col, bias_ptr, y_ptr, pre_ptr, n_rows, n_cols, GELU: tl.constexpr):
    """Adds the bias, writes the sum to pre and, through GELU, to y, from (row, col) on."""
    rows, cols = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1])
    mask = (row + rows[:, None] < n_rows) & (col + cols[None, :] < n_cols)
    # Only the tile's corner needs 64 bits.
    corner = tl.cast(row, tl.int64) * n_cols + col
    within = rows[:, None] * n_cols + cols[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col + cols, mask=col + cols < n_cols, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + corner + within, acc, mask=mask)
    if GELU:
        acc = gelu_of(acc)
    tl.store(y_ptr + corner + within, acc, mask=mask)


@triton.jit
def _finish(
    acc, row, col, bias_ptr, y_ptr, pre_ptr, n_rows, n_cols, GELU: tl.constexpr, PARTS: tl.constexpr
):
    """The epilogue in 1, 2 or 4 parts side by side, as many as keep it in the registers."""
    N: tl.constexpr = acc.shape[1]
    if PARTS == 1:
        finish_part(acc, row, col, bias_ptr, y_ptr, pre_ptr, n_rows, n_cols, GELU)
    else:
        a, b = _halves(acc)
        if PARTS == 2:
            finish_part(a, row, col, bias_ptr, y_ptr, pre_ptr, n_rows, n_cols, GELU)
            finish_part(b, row, col + N // 2, bias_ptr, y_ptr, pre_ptr, n_rows, n_cols, GELU)
        else:
            a, c = _halves(a)
            finish_part(a, row, col, bias_ptr, y_ptr, pre_ptr, n_rows, n_cols, GELU)
            finish_part(c, row, col + N // 4, bias_ptr, y_ptr, pre_ptr, n_rows, n_cols, GELU)
            col += N // 2
            a, c = _halves(b)
            finish_part(a, row, col, bias_ptr, y_ptr, pre_ptr, n_rows, n_cols, GELU)
            finish_part(c, row, col + N // 4, bias_ptr, y_ptr, pre_ptr, n_rows, n_cols, GELU)


@triton.jit(do_not_specialize=["n_rows"])
def linear_kernel(
    x_ptr,  # [n_rows, depth]
    weight_ptr,  # [n_cols, depth], any strides
    bias_ptr,  # [n_cols], or None
    y_ptr,  # [n_rows, n_cols]
    pre_ptr,  # like y, or None
    n_rows,
    n_cols,
    depth,
    stride_n,
    stride_k,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    # One program owns a tile of y.
    tiles_m, tiles_n = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N)
    m, n = _place(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    rows, cols = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptr += rows[:, None].to(tl.int64) * depth + k[None, :]
    weight_ptr += cols[None, :].to(tl.int64) * stride_n + k[:, None].to(tl.int64) * stride_k
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = start + k < depth
        x_mask = (rows[:, None] < n_rows) & inside[None, :]
        weight_mask = inside[:, None] & (cols[None, :] < n_cols)
        x = tl.load(x_ptr, mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weight_ptr, mask=weight_mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        x_ptr += BLOCK_K
        weight_ptr += BLOCK_K * stride_k
    row, col = m * BLOCK_M, n * BLOCK_N
    _finish(acc, row, col, bias_ptr, y_ptr, pre_ptr, n_rows, n_cols, GELU, PARTS)


@triton.jit(do_not_specialize=["n_rows"])
def linear_tma_kernel(
    x_desc,  # [n_rows, depth], in blocks of BLOCK_M by BLOCK_K
    weight_desc,  # [n_cols, depth], in blocks of BLOCK_N by BLOCK_K
    bias_ptr,  # [n_cols], or None
    y_ptr,  # [n_rows, n_cols]
    pre_ptr,  # like y, or None
    n_rows,
    n_cols,
    depth,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    # One program owns every programs-th tile of y. Rows and columns past the ends read as zero.
    tiles_m, tiles_n = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = _place(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, depth, BLOCK_K):
            x = x_desc.load([m * BLOCK_M, start])  # [BLOCK_M, BLOCK_K]
            weight = weight_desc.load([n * BLOCK_N, start])  # [BLOCK_N, BLOCK_K]
            acc = tl.dot(x, tl.trans(weight), acc)
        row, col = m * BLOCK_M, n * BLOCK_N
        _finish(acc, row, col, bias_ptr, y_ptr, pre_ptr, n_rows, n_cols, GELU, PARTS)


@triton.jit
def add_rows(acc, weight, x_ptr, k, n_rows, depth, PRECISION: tl.constexpr):
    """acc + x weight^T over the elements k of each row of x, for a weight [N, K] in registers."""
    ROWS: tl.constexpr = acc.shape[0]
    rows = tl.arange(0, ROWS)
    if ROWS >= 16:
        offset = rows[:, None] * depth + k[None, :]
        x_mask = (rows[:, None] < n_rows) & (k[None, :] < depth)
        x = tl.load(x_ptr + offset, mask=x_mask, other=0.0)  # [ROWS, K]
        weight = tl.trans(weight.to(x.dtype))
        if x.dtype == tl.float32:
            # A chain of sums as long as a block, no longer: the compiler turns `acc + dot` into one
            # chain over the whole depth, whose error grows with it.
            acc = tl.fma(tl.dot(x, weight, input_precision=PRECISION), 1.0, acc)
        else:
            acc = tl.dot(x, weight, acc)
    else:
        wide = weight.to(tl.float32)
        for row in tl.static_range(ROWS):
            ends = tl.where(row < n_rows, depth, 0)
            x = tl.load(x_ptr + row * depth + k, mask=k < ends, other=0.0).to(tl.float32)  # [K]
            sums = tl.sum(wide * x[None, :], axis=1)  # [N]
            acc += tl.where(rows[:, None] == row, sums[None, :], 0.0)
    return acc


@triton.jit(do_not_specialize=["n_rows"])
def linear_rows_kernel(
    x_ptr,  # [n_rows, depth]
    weight_ptr,  # [n_cols, depth], any strides
    bias_ptr,  # [n_cols], or None
    y_ptr,  # [n_rows, n_cols]
    pre_ptr,  # like y, or None
    n_rows,
    n_cols,
    depth,
    stride_n,
    stride_k,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program owns BLOCK_N columns of all rows.
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    weight_ptr += cols[:, None].to(tl.int64) * stride_n + k[None, :].to(tl.int64) * stride_k
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = start + k < depth
        weight_mask = (cols[:, None] < n_cols) & inside[None, :]
        weight = tl.load(weight_ptr, mask=weight_mask, other=0.0)  # [BLOCK_N, BLOCK_K]
        acc = add_rows(acc, weight, x_ptr, start + k, n_rows, depth, PRECISION)
        weight_ptr += BLOCK_K * stride_k
    col = tl.program_id(0) * BLOCK_N
    _finish(acc, 0, col, bias_ptr, y_ptr, pre_ptr, n_rows, n_cols, GELU, 1)


def padded_rows(n_rows: int) -> int:
    """The rows that a program of few holds: 1, 2, 4 or 16."""
    return triton.next_power_of_2(n_rows) if n_rows <= 4 else SMALL


def _takes_tma(x: Tensor, weight: Tensor) -> bool:
    """Whether both can be read by TMA: contiguous rows that start at multiples of 16 bytes."""
    return (
        launch_table.device_of(x).arch in _TMA_ARCHS
        and x.element_size() == 2
        and x.dtype == weight.dtype
        and weight.stride(1) == 1
        and x.shape[-1] % 8 == 0
        and weight.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
        and weight.data_ptr() % 16 == 0
    )


def takes(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a weight lies as the kernels can read it, which any does."""
    return bias is None or bias.is_contiguous()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    pre: Tensor | None = None,
    gelu: bool = False,
    owner: object | None = None,
) -> None:
    """Writes y = act(x weight^T + bias), act the tanh GELU or nothing, and pre, what went into act.

    x: [..., K] contiguous; weight: [N, K] of x's dtype, any strides; bias: [N] contiguous or None;
    y, pre: [..., N] contiguous. float32 is multiplied in full precision, unless
    torch.backends.cuda.matmul.allow_tf32 says otherwise. Of an owner nothing is kept.
    """
    n_cols, depth = weight.shape
    n_rows = y.numel() // n_cols if n_cols else 0
    if n_rows == 0:
        return
    precision = launch_table.precision(x)
    tensors = (bias, y, pre, n_rows, n_cols, depth)
    if n_rows <= SMALL:
        rows = padded_rows(n_rows)
        launch = launch_table.launch("linear_rows", x, rows)
        linear_rows_kernel[(triton.cdiv(n_cols, launch["BLOCK_N"]),)](
            x, weight, *tensors, *weight.stride(), gelu, precision, ROWS=rows, **launch
        )
        return
    if _takes_tma(x, weight):
        launch = launch_table.launch("linear_tma", x, "ragged" if n_cols % 8 else launch_table.ANY)
        block_m, block_n, block_k = launch["BLOCK_M"], launch["BLOCK_N"], launch["BLOCK_K"]
        tiles = triton.cdiv(n_rows, block_m) * triton.cdiv(n_cols, block_n)
        linear_tma_kernel[(min(tiles, launch_table.device_of(x).multiprocessors),)](
            TensorDescriptor.from_tensor(x.view(n_rows, depth), [block_m, block_k]),
            TensorDescriptor.from_tensor(weight, [block_n, block_k]),
            *tensors,
            gelu,
            **launch,
        )
        return
    launch = launch_table.launch("linear_tf32" if precision == "tf32" else "linear", x)
    tiles = triton.cdiv(n_rows, launch["BLOCK_M"]) * triton.cdiv(n_cols, launch["BLOCK_N"])
    linear_kernel[(tiles,)](x, weight, *tensors, *weight.stride(), gelu, precision, **launch)
