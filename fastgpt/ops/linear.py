"""The product of a linear layer, from the live weight in whatever layout it has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch
from fastgpt.cpu.records import gradient_like


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, owner: object | None = None
) -> Tensor:
    """x W^T + bias.

    Args:
        x: [..., n_in], any floating dtype.
        weight: [n_out, n_in].
        bias: [n_out] or None.
        owner: what the scratch memory is kept with between calls, say the model; with none it goes
            with the call.

    Returns:
        [..., n_out].

    Raises:
        RuntimeError: the shapes do not fit each other, as PyTorch says it.
        BackendError: a backend asked for by name cannot take these tensors.
    """
    if torch.compiler.is_compiling() or dispatch.autocasts(x):
        return F.linear(x, weight, bias)
    kernels = dispatch.kernels("linear", x, weight, bias)
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1]
    if kernels is None or not fits or not kernels.takes(weight, bias):
        return F.linear(x, weight, bias)
    if dispatch.needs_grad(x, weight, bias):
        return _Linear.apply(kernels, x, weight, bias, owner)
    return _forward(kernels, x, weight, bias, owner)


def _forward(kernels, x, weight, bias, owner):
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    kernels.linear(x.contiguous(), weight, bias, y, owner=owner)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, weight, bias, owner):
        ctx.save_for_backward(x, weight)
        ctx.kernels, ctx.owner = kernels, owner
        return _forward(kernels, x, weight, bias, owner)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        _, for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        if not dispatch.once(dy):  # differentiable itself
            rows = dy.flatten(0, -2)
            dx = dy @ weight if for_x else None
            dweight = rows.mT @ x.flatten(0, -2) if for_weight else None
            return None, dx, dweight, rows.sum(0) if for_bias else None, None
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if for_x else None
        dweight = gradient_like(weight) if for_weight else None
        dbias = weight.new_empty(weight.shape[0]) if for_bias else None
        ctx.kernels.linear_backward(
            dy.contiguous(), x.contiguous(), weight, dx, dweight, dbias, owner=ctx.owner
        )
        return None, dx, dweight, dbias, None
