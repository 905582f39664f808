"""The tanh GELU, with or without a bias in front (Hendrycks and Gimpel, arXiv 1606.08415)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch
from fastgpt.cpu import gelu as cpu


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    Args:
        x: any shape, any floating dtype.

    Returns:
        The shape and dtype of x.

    Raises:
        BackendError: a backend asked for by name cannot take x.
    """
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
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [N] for x {tuple(x.shape)}")
    if out is not None:
        if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
            raise ValueError(f"out must be contiguous, {tuple(x.shape)} and {x.dtype} like x")
        if dispatch.needs_grad(x, bias):
            raise RuntimeError("bias_gelu: out is not for tensors that need a gradient")
    return _bias_gelu(x, bias, out)


def _bias_gelu(x: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    tensors = (x,) if bias is None else (x, bias)
    if torch.compiler.is_compiling():
        if dispatch.traceable(*tensors):
            return torch.ops.fastgpt.bias_gelu(x, bias)
        return _torch(x, bias)
    if dispatch.choose("gelu", *tensors) == "reference":
        y = _torch(x, bias)
        return y if out is None else out.copy_(y)
    if dispatch.needs_grad(*tensors):
        return _BiasGelu.apply(x, bias)
    return _forward(x, bias, out)


def _torch(x: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _forward(x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    x = x.contiguous()
    if out is None:
        out = torch.empty_like(x)
    cpu.bias_gelu(x, None if bias is None else bias.contiguous(), out)
    return out


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return _forward(x, bias)

    @staticmethod
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        # Differentiable itself, so double backward works.
        dx = torch.ops.aten.gelu_backward(dy, x if bias is None else x + bias, approximate="tanh")
        db = dx.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return dx if ctx.needs_input_grad[0] else None, db


@torch.library.custom_op("fastgpt::bias_gelu", mutates_args=())
def _bias_gelu_op(x: Tensor, bias: Tensor | None) -> Tensor:
    tensors = (x,) if bias is None else (x, bias)
    if dispatch.choose("gelu", *tensors) == "reference":
        return _torch(x, bias).contiguous()
    return _forward(x, bias)


@_bias_gelu_op.register_fake
def _(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_bias_gelu_op.register_autograd(
    _BiasGelu.backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
