"""The product of a linear layer, from the live weight in whatever layout it has; with or without
GELU behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch
from fastgpt.cpu.records import gradient_like
from fastgpt.ops.gelu import bias_gelu, gelu
from fastgpt.triton import vendor


@dispatch.falls_back
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, owner: object | None = None
) -> Tensor:
    """x W^T + bias.

    Args:
        x: [..., n_in], any floating dtype.
        weight: [n_out, n_in].
        bias: [n_out] or None.
        owner: keeps the scratch memory between calls, such as the model; without one it goes with
            the call.

    Returns:
        [..., n_out].

    Raises:
        RuntimeError: the shapes do not fit each other, as PyTorch says it.
        BackendError: a backend asked for by name cannot take these tensors.
    """
    if torch.compiler.is_compiling() or dispatch.autocasts(x):
        dispatch.check_invariance("linear", "under autocast")
        return F.linear(x, weight, bias)
    backend = dispatch.choose("linear", x, weight, bias)
    # On a GPU the vendor's product, and its gradients, are what torch runs.
    if backend == "triton" and (
        dispatch.needs_grad(x, weight, bias) or not vendor.own_product(x, _rows(x))
    ):
        return F.linear(x, weight, bias)
    kernels = dispatch.module(backend, "linear", x)
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1]
    if kernels is None or not fits or not kernels.takes(weight, bias):
        if fits:  # else PyTorch says what does not
            dispatch.check_invariance("linear", "its weight is too deep, or an odd view")
        return F.linear(x, weight, bias)
    if dispatch.needs_grad(x, weight, bias):
        return _Linear.apply(kernels, x, weight, bias, owner)
    return _forward(kernels, x, weight, bias, owner)


@dispatch.falls_back
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, owner: object | None = None) -> Tensor:
    """gelu(x W^T + bias).

    Args:
        x: [..., n_in], any floating dtype; under autocast all three are narrowed first.
        weight: [n_out, n_in].
        bias: [n_out].
        owner: as for ``linear``.

    Returns:
        [..., n_out].

    Raises:
        RuntimeError: the shapes do not fit each other, as PyTorch says it.
        BackendError: a backend asked for by name cannot take these tensors.
    """
    wide, autocasts = (x, weight, bias), dispatch.autocasts(x)
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1]
    fits = fits and bias is not None and bias.shape == weight.shape[:1]
    if fits and autocasts and dispatch.direct(wide):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    backend = dispatch.choose("linear", x, weight, bias) if fits else "reference"
    if backend == "triton" and vendor.own_product(x, _rows(x), gelu=True):
        kernels = dispatch.module(backend, "linear", x)
        if not dispatch.needs_grad(x, weight, bias):
            return _forward(kernels, x, weight, bias, owner, gelu=True)
        slopes = dispatch.kernels("gelu", x)
        if slopes is not None:
            return _LinearGelu.apply(kernels, slopes, x, weight, bias)
    # Autocast rounds the sum of product and bias, not the product.
    if autocasts or backend == "reference":
        return gelu(F.linear(*wide))
    h = linear(x, weight, owner=owner)
    return bias_gelu(h, bias, out=None if dispatch.needs_grad(h, bias) else h)


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _forward(kernels, x, weight, bias, owner, **how):
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    kernels.linear(x.contiguous(), weight, bias, y, owner=owner, **how)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, weight, bias, owner):
        # What no gradient needs the values of may change before backward, which .data lets it.
        _, for_x, for_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else x.data, weight if for_x else weight.data)
        ctx.kernels, ctx.owner = kernels, owner
        return _forward(kernels, x, weight, bias, owner)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        _, for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        if not dispatch.first_order(ctx.kernels, dy):  # differentiable itself
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


class _LinearGelu(torch.autograd.Function):
    """One kernel forward, which keeps what went into GELU; backward GELU's, fused with the bias's
    gradient, and the vendor's products.
    """

    @staticmethod
    def forward(ctx, kernels, slopes, x, weight, bias):
        pre = x.new_empty(*x.shape[:-1], weight.shape[0])
        ctx.save_for_backward(x, weight, bias, pre)
        ctx.slopes = slopes
        return _forward(kernels, x, weight, bias, None, pre=pre, gelu=True)

    @staticmethod
    @dispatch.falls_back
    def backward(ctx, dy):
        x, weight, bias, pre = ctx.saved_tensors
        _, _, for_x, for_weight, for_bias = ctx.needs_input_grad
        if dispatch.first_order(ctx.slopes, dy):
            dpre = torch.empty_like(pre)
            dbias = weight.new_empty(weight.shape[0]) if for_bias else None
            ctx.slopes.bias_gelu_backward(dy.contiguous(), pre, None, dpre, dbias)
        else:  # differentiable itself, so it starts from x
            pre = F.linear(x, weight, bias)
            dpre = torch.ops.aten.gelu_backward(dy, pre, approximate="tanh")
            dbias = dpre.flatten(0, -2).sum(0) if for_bias else None
        dx = dpre @ weight if for_x else None
        dweight = dpre.flatten(0, -2).mT @ x.flatten(0, -2) if for_weight else None
        return None, None, dx, dweight, dbias
