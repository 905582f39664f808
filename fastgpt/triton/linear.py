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
from fastgpt.triton.compilation import on_grid
from fastgpt.triton.linear_rows import SMALL, finish_part, linear_rows

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
    if n_rows <= SMALL:
        linear_rows(x, weight, bias, y, pre, gelu)
        return
    precision = launch_table.precision(x)
    tensors = (bias, y, pre, n_rows, n_cols, depth)
    if _takes_tma(x, weight):
        launch = launch_table.launch("linear_tma", x, "ragged" if n_cols % 8 else launch_table.ANY)
        block_m, block_n, block_k = launch["BLOCK_M"], launch["BLOCK_N"], launch["BLOCK_K"]
        tiles = triton.cdiv(n_rows, block_m) * triton.cdiv(n_cols, block_n)
        on_grid(linear_tma_kernel, (min(tiles, launch_table.device_of(x).multiprocessors),))(
            TensorDescriptor.from_tensor(x.view(n_rows, depth), [block_m, block_k]),
            TensorDescriptor.from_tensor(weight, [block_n, block_k]),
            *tensors,
            gelu,
            **launch,
        )
        return
    launch = launch_table.launch("linear_tf32" if precision == "tf32" else "linear", x)
    tiles = triton.cdiv(n_rows, launch["BLOCK_M"]) * triton.cdiv(n_cols, launch["BLOCK_N"])
    on_grid(linear_kernel, (tiles,))(
        x, weight, *tensors, *weight.stride(), gelu, precision, **launch
    )
