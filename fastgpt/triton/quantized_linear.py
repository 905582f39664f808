"""The product of few rows with a weight held in 8 or 4 bits, in Triton: the narrow weight is read
once and widened in registers. Many rows take the vendor's product of the dequantised weight.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.quantized_weight import RUN, Int8Weight, QuantizedWeight
from fastgpt.triton import launch_table
from fastgpt.triton.compilation import on_grid
from fastgpt.triton.linear_rows import SMALL, add_rows, finish_part, padded_rows


@triton.jit(do_not_specialize=["n_rows"])
def int8_rows_kernel(
    x_ptr,  # [n_rows, depth]
    weight_ptr,  # int8 [n_cols, depth]
    scale_ptr,  # float32 [n_cols]
    bias_ptr,  # [n_cols], or None
    y_ptr,  # [n_rows, n_cols]
    n_rows,
    n_cols,
    depth,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program owns BLOCK_N columns of all rows.
    col = tl.program_id(0) * BLOCK_N
    cols, k = col + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    weight_ptr += cols[:, None].to(tl.int64) * depth + k[None, :]
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        mask = (cols[:, None] < n_cols) & (start + k[None, :] < depth)
        weight = tl.load(weight_ptr, mask=mask, other=0)  # [BLOCK_N, BLOCK_K]
        acc = add_rows(acc, weight, x_ptr, start + k, n_rows, depth, PRECISION)
        weight_ptr += BLOCK_K
    acc *= tl.load(scale_ptr + cols, mask=cols < n_cols, other=0.0)[None, :]
    finish_part(acc, 0, col, bias_ptr, y_ptr, None, n_rows, n_cols, False)


@triton.jit(do_not_specialize=["n_rows"])
def int4_rows_kernel(
    x_ptr,  # [n_rows, depth]
    weight_ptr,  # uint8 [n_cols, depth / 2], laid out as Int4Weight says
    scale_ptr,  # bfloat16 [n_cols, depth / (32 * GROUP)]
    minimum_ptr,  # like scale
    bias_ptr,  # [n_cols], or None
    y_ptr,  # [n_rows, n_cols]
    n_rows,
    n_cols,
    depth,
    GROUP: tl.constexpr,  # runs of 32 that share a scale
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program owns BLOCK_N columns of all rows.
    RUNS: tl.constexpr = BLOCK_K // 32
    col, n_runs = tl.program_id(0) * BLOCK_N, depth // 32
    cols, runs, k = col + tl.arange(0, BLOCK_N), tl.arange(0, RUNS), tl.arange(0, RUNS * 16)
    k = k // 16 * 32 + k % 16  # the elements in the low four bits
    row_start = cols[:, None].to(tl.int64) * n_runs
    weight_ptr += (row_start + runs[None, :])[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(0, n_runs, RUNS):
        mask = (cols[:, None] < n_cols) & (start + runs[None, :] < n_runs)
        at = (row_start + start + runs[None, :]) // GROUP
        scale = tl.load(scale_ptr + at, mask=mask, other=0.0).to(tl.float32)[:, :, None]
        minimum = tl.load(minimum_ptr + at, mask=mask, other=0.0).to(tl.float32)[:, :, None]
        pairs = tl.load(weight_ptr, mask=mask[:, :, None], other=0)  # [BLOCK_N, RUNS, 16]
        low = tl.reshape((pairs & 15).to(tl.float32) * scale + minimum, [BLOCK_N, RUNS * 16])
        high = tl.reshape((pairs >> 4).to(tl.float32) * scale + minimum, [BLOCK_N, RUNS * 16])
        acc = add_rows(acc, low, x_ptr, start * 32 + k, n_rows, depth, PRECISION)
        acc = add_rows(acc, high, x_ptr, start * 32 + k + 16, n_rows, depth, PRECISION)
        weight_ptr += RUNS * 16
    finish_part(acc, 0, col, bias_ptr, y_ptr, None, n_rows, n_cols, False)


def takes(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> bool:
    """Whether x has at most 16 rows, and the rest lies as the kernels read it: contiguous, beside
    x.
    """
    given = [*weight] if bias is None else [*weight, bias]
    return (
        x.numel() <= SMALL * x.shape[-1]
        and (bias is None or bias.shape == weight.values.shape[:1])
        and all(t.is_contiguous() and t.device == x.device for t in given)
    )


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, y: Tensor) -> None:
    """Writes y = x W^T + bias for the W that the weight stands for.

    x: [..., n_in] contiguous, at most 16 rows; the weight contiguous; bias: [n_out] contiguous or
    None; y: [..., n_out] contiguous. Sums are float32. Of 5 rows or more in 16 bits the int4 W is
    rounded to x's dtype, for the tensor cores.
    """
    n_cols, depth = weight.values.shape[0], x.shape[-1]
    n_rows = y.numel() // n_cols if n_cols else 0
    if n_rows == 0:
        return
    rows, int8 = padded_rows(n_rows), isinstance(weight, Int8Weight)
    launch: dict[str, Any] = {"ROWS": rows, "PRECISION": launch_table.precision(x)}
    launch |= launch_table.launch("int8_rows" if int8 else "int4_rows", x, rows)
    if not int8:
        groups = weight.scale.shape[1]
        launch["GROUP"] = depth // (RUN * groups) if groups else 1
    kernel = int8_rows_kernel if int8 else int4_rows_kernel
    on_grid(kernel, (triton.cdiv(n_cols, launch["BLOCK_N"]),))(
        x, *weight, bias, y, n_rows, n_cols, depth, **launch
    )
