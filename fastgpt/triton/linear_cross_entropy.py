"""The output head and its cross entropy in one, in chunks of rows: the logits of all tokens, which
would be the largest tensor of training, never exist at once.

The products are cuBLAS's; the kernels between them turn a chunk's logits into its losses and then,
in place, into their gradient, of which the gradients of x and weight are made at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.triton.cross_entropy import cross_entropy, cross_entropy_backward
from fastgpt.triton.linear import takes as takes

# What a chunk's logits may take. Larger chunks add up dweight less often.
CHUNK_BYTES = 512 * 2**20


def _chunk_rows(pitch: int, itemsize: int) -> int:
    rows = CHUNK_BYTES // (pitch * itemsize)
    return max(rows // 128 * 128, 1)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    loss: Tensor,
    upstream: Tensor | None = None,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
    owner: object | None = None,
) -> None:
    """Writes each row's cross entropy of x weight^T and, for upstream, the gradients of the losses,
    dx and dweight where they are given.

    x, dx: [N, D] contiguous; weight, dweight: [V, D], the dtype of x; targets: [N] contiguous, any
    integer dtype; loss, upstream: [N] float32. Ignored rows have loss and gradient 0. Of an owner
    nothing is kept: torch's allocator keeps the memory.
    """
    n_rows, vocabulary = len(x), len(weight)
    # Rows start at multiples of 128 bytes, so that they are read 16 bytes at a time.
    pitch = -(-vocabulary // 64) * 64
    chunk = min(_chunk_rows(pitch, x.element_size()), max(n_rows, 1))
    buffer = torch.empty((chunk, pitch), dtype=x.dtype, device=x.device)
    lse = torch.empty(chunk, dtype=torch.float64, device=x.device)
    total = dweight
    if dweight is not None and dweight.dtype != torch.float32 and chunk < n_rows:
        total = torch.empty(dweight.shape, dtype=torch.float32, device=x.device)
    if total is not None and n_rows == 0:
        total.zero_()
    for start in range(0, n_rows, chunk):
        rows = slice(start, min(start + chunk, n_rows))
        n = rows.stop - start
        logits = buffer[:n, :vocabulary]
        torch.mm(x[rows], weight.t(), out=logits)
        cross_entropy(logits, targets[rows], ignore_index, loss[rows], lse)
        if upstream is None:
            continue
        cross_entropy_backward(logits, targets[rows], ignore_index, lse, upstream[rows])
        if dx is not None:
            torch.mm(logits, weight, out=dx[rows])
        if total is not None:
            _add_product(total, logits.t(), x[rows], first=start == 0)
    if dweight is not None and total is not None and total is not dweight:
        dweight.copy_(total)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Adds a b to the total, of the same dtype or float32; the first product is written to it."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=int(not first), out=total)
    elif _adds_unrounded(total):
        torch.addmm(total, a, b, torch.float32, beta=int(not first), out=total)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total += torch.mm(a, b)


def _adds_unrounded(total: Tensor) -> bool:
    """Whether torch adds a 16-bit product to this float32 total without rounding it first: on
    NVIDIA's GPUs, right since torch 2.10 (pytorch #167931).
    """
    return total.is_cuda and torch.version.hip is None and torch.__version__ >= "2.10"
