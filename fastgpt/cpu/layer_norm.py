"""LayerNorm on the CPU, with or without a residual add in front."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.cpu import _C
from fastgpt.cpu.in_float32 import in_float32
from fastgpt.cpu.records import FORMATS, data


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    y: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    branch: Tensor | None = None,
    total: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> None:
    """Writes y = LayerNorm(x), or total = x + dropout(branch) and y = LayerNorm(total).

    x, branch, total, y: [..., D] contiguous; weight, bias: [D] contiguous; mean, rstd: one a row.
    Sums are float32 whatever they are; mean and rstd stay that. total may be x, and is rounded to
    its dtype before it is normalised, because backward has nothing else.
    """
    if total is not None and total.dtype is not torch.float32:
        _layer_norm(
            x, weight, bias, eps, torch.empty_like(y), None, None, branch, total, dropout_p, seed
        )
        x, branch, total = total, None, None
    _layer_norm(x, weight, bias, eps, y, mean, rstd, branch, total, dropout_p, seed)


@in_float32("y", "total")
def _layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    branch: Tensor | None,
    total: Tensor | None,
    dropout_p: float,
    seed: int,
) -> None:
    cols = x.shape[-1]
    if x.numel() == 0:
        return
    _C.layer_norm(
        x.data_ptr(),
        data(branch),
        weight.data_ptr(),
        bias.data_ptr(),
        data(total),
        y.data_ptr(),
        data(mean),
        data(rstd),
        x.numel() // cols,
        cols,
        eps,
        seed,
        dropout_p,
        torch.get_num_threads(),
    )


@in_float32("dx", "dweight", "dbias", "dbranch")
def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    dtotal: Tensor | None = None,
    dbranch: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> None:
    """Writes the gradients that are given: dx with dtotal added, dbranch = dx behind the dropout.

    x: what was normalised. dy, x, dx, dtotal, dbranch: [..., D] contiguous; weight, dweight, dbias:
    [D] contiguous, the gradients both or neither; mean, rstd: one a row.
    """
    cols = x.shape[-1]
    rows = x.numel() // max(cols, 1)
    if x.numel() == 0:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
        return
    partials = None
    if dweight is not None:
        partials = x.new_empty(_C.norm_partials(rows, cols))
    rest = (mean, rstd, dtotal, dx, dweight, dbias, partials)
    scale = (data(weight), FORMATS[torch.float32])
    _C.layer_norm_backward(
        [data(dy), data(x), *scale, *map(data, rest), rows, cols],
        data(dbranch),
        seed,
        dropout_p,
        torch.get_num_threads(),
    )
