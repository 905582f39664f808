"""The tanh GELU, with or without a bias in front (Hendrycks and Gimpel, arXiv 1606.08415)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch, reference


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    Args:
        x: any shape, any floating dtype; of integers the result is float32, as the book's.

    Returns:
        The shape and dtype of x.

    Raises:
        BackendError: a backend asked for by name cannot take x.
    """
    if not x.is_floating_point():
        return reference.gelu(x)
    return _bias_gelu(x, None, None)


def bias_gelu(x: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """gelu(x + bias) in one pass.

    Args:
        x: [..., N], any floating dtype.
        bias: [N].
        out: where to write, of the shape and dtype of x and contiguous; it may be x. Not with
            gradients.

    Returns:
        [..., N], out where it was given.

    Raises:
        ValueError: bias is not [N], or out does not fit x.
        RuntimeError: out was given and a gradient would be recorded.
        BackendError: a backend asked for by name cannot take these tensors.
    """
    if bias.dim() != 1 or bias.shape != x.shape[-1:]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [N] for x {tuple(x.shape)}")
    if out is not None:
        if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
            raise ValueError(f"out must be contiguous, {tuple(x.shape)} and {x.dtype} like x")
        if dispatch.needs_grad(x, bias):
            raise RuntimeError("bias_gelu: out is not for tensors that need a gradient")
    return _bias_gelu(x, bias, out)


@dispatch.falls_back
def _bias_gelu(x: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    tensors = (x,) if bias is None else (x, bias)
    if torch.compiler.is_compiling():
        if dispatch.traceable("gelu", *tensors):
            return torch.ops.fastgpt.bias_gelu(x, bias)
        return _torch(x, bias)
    kernels = dispatch.kernels("gelu", x, bias)
    if kernels is None:
        y = _torch(x, bias)
        return y if out is None else out.copy_(y)
    if dispatch.needs_grad(x, bias):
        return _BiasGelu.apply(kernels, x, bias)
    return _forward(kernels, x, bias, out)


def _torch(x: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _forward(kernels, x, bias, out=None):
    x = x.contiguous()
    if out is None:
        out = torch.empty_like(x)
    kernels.bias_gelu(x, None if bias is None else bias.contiguous(), out)
    return out


def _formulas(dy, x, bias, wanted):
    """The gradients of x and bias by operations that are differentiable themselves."""
    dx = torch.ops.aten.gelu_backward(dy, x if bias is None else x + bias, approximate="tanh")
    db = dx.flatten(0, -2).sum(0) if wanted[1] else None
    return dx if wanted[0] else None, db


def _backward(kernels, dy, x, bias, wanted):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    db = bias.new_empty(bias.shape) if wanted[1] else None
    bias = None if bias is None else bias.contiguous()
    kernels.bias_gelu_backward(dy.contiguous(), x.contiguous(), bias, dx, db)
    return dx if wanted[0] else None, db


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, bias):
        ctx.save_for_backward(x, bias)
        ctx.kernels = kernels
        return _forward(kernels, x, bias)

    @staticmethod
    @dispatch.falls_back
    def backward(ctx, dy):
        wanted = ctx.needs_input_grad[1:]
        x, bias = ctx.saved_tensors
        if dispatch.first_order(ctx.kernels, dy):
            return None, *_backward(ctx.kernels, dy, x, bias, wanted)
        return None, *_formulas(dy, x, bias, wanted)


@torch.library.custom_op("fastgpt::bias_gelu", mutates_args=())
@dispatch.falls_back
def _bias_gelu_op(x: Tensor, bias: Tensor | None) -> Tensor:
    kernels = dispatch.kernels("gelu", x, bias)
    return _torch(x, bias).contiguous() if kernels is None else _forward(kernels, x, bias)


@_bias_gelu_op.register_fake
def _(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _op_backward(ctx, dy):
    """Traced by torch.compile, which makes its own kernels of the formulas."""
    x, bias = ctx.saved_tensors
    return _formulas(dy, x, bias, ctx.needs_input_grad)


_bias_gelu_op.register_autograd(
    _op_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
