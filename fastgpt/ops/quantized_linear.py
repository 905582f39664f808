"""The product of a linear layer whose weight is held in 8 or 4 bits."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch
from fastgpt.cpu.records import Dynamic, shape_of
from fastgpt.quantized_weight import Int4Weight, Int8Weight, QuantizedWeight, dequantize
from fastgpt.triton import vendor


@dispatch.falls_back
def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, dynamic: bool = False
) -> Tensor:
    """x W^T + bias, for the W that the weight stands for.

    x and the bias have gradients, the weight has none. With `dynamic` the gradient of x is that of
    the product with W: rounding passes it on.

    Args:
        x: [..., n_in], any floating dtype.
        weight: an ``Int8Weight`` or ``Int4Weight`` of [n_out, n_in].
        bias: [n_out] or None.
        dynamic: also round x, to 8 bits with a scale for each row, the row's largest magnitude /
            127. Takes an ``Int8Weight``.

    Returns:
        [..., n_out], in x's dtype, or autocast's.

    Raises:
        TypeError: dynamic, and the weight is not an ``Int8Weight``; a part of it is no tensor.
        RuntimeError: the shapes do not fit each other, as PyTorch says it.
    """
    if dynamic and not isinstance(weight, Int8Weight):
        raise TypeError(f"dynamic takes an Int8Weight, got {type(weight).__name__}")
    for name, part in zip(type(weight)._fields, weight, strict=True):
        if not isinstance(part, Tensor):
            raise TypeError(f"the weight's {name} must be a tensor, got {type(part).__name__}")
    if dispatch.needs_grad(x, bias) or dispatch.transformed():
        return _QuantizedLinear.apply(x, bias, dynamic, *weight)
    return _product(x, weight, bias, dynamic)


def _product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, dynamic: bool) -> Tensor:
    launch = _launcher(x, weight, bias, dynamic)
    if launch is not None:
        y = x.new_empty(*x.shape[:-1], weight.values.shape[0])
        launch(x.contiguous(), _held(weight, dynamic), bias, y)
        return y
    dispatch.check_invariance(
        "quantized_linear", "its weight is too deep, or is widened for PyTorch's own"
    )
    if not dynamic:
        return F.linear(x, dequantize(weight, x.dtype), bias)
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    autocast: Any = contextlib.nullcontext()
    if dispatch.autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        autocast = torch.autocast(x.device.type, enabled=False)
    scale = x.to(wide).abs().amax(-1, keepdim=True) / 127
    q = (x.to(wide) / scale.where(scale != 0, 1.0)).round()
    with autocast:  # whole numbers, exact in float32 as far as their sums stay below 2^24
        y = F.linear(q, weight.values.to(wide)) * (scale * weight.scale)
    return (y if bias is None else y + bias).to(dtype)


def _launcher(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, dynamic: bool) -> Any:
    """What writes the product; None for PyTorch's own, of the dequantised weight."""
    if torch.compiler.is_compiling() or dispatch.autocasts(x):
        return None
    backend = dispatch.choose("quantized_linear", x, bias)
    if backend == "reference" or x.dim() == 0 or x.shape[-1] != shape_of(weight)[1]:
        return None
    if backend == "cpu":
        kernels = dispatch.module("cpu", "linear", x)
        return kernels.linear if kernels.takes(_held(weight, dynamic), bias) else None
    rows = x.numel() // max(x.shape[-1], 1)
    if dynamic or not vendor.own_product(x, rows) or not dispatch.direct(weight):
        return None
    kernels = dispatch.module("triton", "quantized_linear", x)
    return kernels.quantized_linear if kernels.takes(x, weight, bias) else None


def _held(weight: QuantizedWeight, dynamic: bool) -> QuantizedWeight | Dynamic:
    return Dynamic(weight) if dynamic and isinstance(weight, Int8Weight) else weight


class _QuantizedLinear(torch.autograd.Function):
    """Keeps the narrow weight for the backward pass rather than the wide one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, bias, dynamic, *weight):
        return _product(x, _weight(weight), bias, dynamic)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, _, *weight = inputs
        ctx.save_for_backward(*weight)
        ctx.save_for_forward(*weight)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx, dy):
        weight = _weight(ctx.saved_tensors)
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ dequantize(weight, dy.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            dbias = dy.flatten(0, -2).sum(0)
        return dx, dbias, None, *(None for _ in weight)

    @staticmethod
    def jvp(ctx, dx, dbias, _, *__):
        weight = _weight(ctx.saved_tensors)
        dy = 0 if dbias is None else dbias
        return dy if dx is None else dx @ dequantize(weight, dx.dtype).mT + dy


def _weight(tensors) -> QuantizedWeight:
    return Int8Weight(*tensors) if len(tensors) == 2 else Int4Weight(*tensors)
