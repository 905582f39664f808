"""LayerNorm over the last dimension, with or without a residual add in front (Ba et al., arXiv
1607.06450).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch, reference
from fastgpt.cpu import layer_norm as cpu


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """weight * (x - mean) / sqrt(var + eps) + bias, mean and biased variance over the last
    dimension.

    Args:
        x: [..., D], any floating dtype.
        weight: [D].
        bias: [D].
        eps: added to the variance.

    Returns:
        [..., D], in the dtype that x, weight and bias promote to.

    Raises:
        ValueError: weight or bias is not [D].
        BackendError: a backend asked for by name cannot take these tensors.
    """
    _check(x, weight, bias)
    if torch.compiler.is_compiling():
        if dispatch.traceable(x, weight, bias):
            return torch.ops.fastgpt.layer_norm(x, weight, bias, eps)[0]
        return _torch(x, weight, bias, eps)
    if dispatch.choose("layer_norm", x, weight, bias) == "reference":
        return _torch(x, weight, bias, eps)
    if dispatch.needs_grad(x, weight, bias):
        return _LayerNorm.apply(x, weight, bias, eps)
    return _forward(x, weight, bias, eps, stats=False)[0]


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The residual add and the LayerNorm after it, in one pass: (layer_norm(x + branch), x +
    branch).

    Args:
        x: [..., D], the residual stream, any floating dtype.
        branch: the shape of x, what is added to it.
        weight: [D].
        bias: [D].
        eps: added to the variance.

    Returns:
        The normalised sum and the sum, each [..., D].

    Raises:
        ValueError: branch has another shape than x, or weight or bias is not [D].
        BackendError: a backend asked for by name cannot take these tensors.
    """
    _check(x, weight, bias)
    if branch.shape != x.shape:
        raise ValueError(f"branch {tuple(branch.shape)} must have the shape of x {tuple(x.shape)}")
    if torch.compiler.is_compiling():
        if dispatch.traceable(x, branch, weight, bias):
            return torch.ops.fastgpt.add_layer_norm(x, branch, weight, bias, eps)[:2]
        return _torch_add(x, branch, weight, bias, eps)
    if dispatch.choose("add_layer_norm", x, branch, weight, bias) == "reference":
        return _torch_add(x, branch, weight, bias, eps)
    if dispatch.needs_grad(x, branch, weight, bias):
        return _AddLayerNorm.apply(x, branch, weight, bias, eps)
    y, total, _, _ = _forward_add(x, branch, weight, bias, eps, stats=False)
    return y, total


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be [D] "
            f"for x {tuple(x.shape)}"
        )


def _torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.dtype == weight.dtype == bias.dtype:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return reference.layer_norm(x, weight, bias, eps)  # promotes mixed dtypes as the book's does


def _torch_add(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + branch
    return _torch(total, weight, bias, eps), total


def _stats(x: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    shape = (*x.shape[:-1], 1)
    return (x.new_empty(shape), x.new_empty(shape)) if wanted else (None, None)


def _forward(x, weight, bias, eps, stats):
    x = x.contiguous()
    y = torch.empty_like(x)
    mean, rstd = _stats(x, stats)
    cpu.layer_norm(x, weight.contiguous(), bias.contiguous(), eps, y, mean, rstd)
    return y, mean, rstd


def _forward_add(x, branch, weight, bias, eps, stats):
    x = x.contiguous()
    y, total = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = _stats(x, stats)
    weight, bias = weight.contiguous(), bias.contiguous()
    cpu.layer_norm(x, weight, bias, eps, y, mean, rstd, branch.contiguous(), total)
    return y, total, mean, rstd


def _backward(dy, saved, wanted):
    # Differentiable itself, so double backward works.
    x, mean, rstd, weight, bias = saved
    return torch.ops.aten.native_layer_norm_backward(
        dy, x, x.shape[-1:], mean, rstd, weight, bias, list(wanted)
    )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, rstd = _forward(x, weight, bias, eps, stats=True)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_backward(dy, ctx.saved_tensors, ctx.needs_input_grad[:3]), None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps):
        y, total, mean, rstd = _forward_add(x, branch, weight, bias, eps, stats=True)
        ctx.save_for_backward(total, mean, rstd, weight, bias)
        return y, total

    @staticmethod
    def backward(ctx, dy, dtotal):
        wanted = ctx.needs_input_grad
        stream = wanted[0] or wanted[1]
        dx, dw, db = _backward(dy, ctx.saved_tensors, (stream, wanted[2], wanted[3]))
        if dx is not None:
            dx = dx + dtotal
        return dx if wanted[0] else None, dx if wanted[1] else None, dw, db, None


@torch.library.custom_op("fastgpt::layer_norm", mutates_args=())
def _layer_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if dispatch.choose("layer_norm", x, weight, bias) == "reference":
        return torch.native_layer_norm(x.contiguous(), x.shape[-1:], weight, bias, eps)
    return _forward(x, weight, bias, eps, stats=True)


@_layer_norm_op.register_fake
def _(x, weight, bias, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), *_stats(x, True)


@torch.library.custom_op("fastgpt::add_layer_norm", mutates_args=())
def _add_layer_norm_op(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if dispatch.choose("add_layer_norm", x, branch, weight, bias) == "reference":
        total = (x + branch).contiguous()
        y, mean, rstd = torch.native_layer_norm(total, x.shape[-1:], weight, bias, eps)
        return y, total, mean, rstd
    return _forward_add(x, branch, weight, bias, eps, stats=True)


@_add_layer_norm_op.register_fake
def _(x, branch, weight, bias, eps):
    empty = torch.empty_like(x, memory_format=torch.contiguous_format)
    return empty, torch.empty_like(empty), *_stats(x, True)


def _setup(ctx, inputs, output):
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _setup_add(ctx, inputs, output):
    _, _, weight, bias, _ = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(total, mean, rstd, weight, bias)


_layer_norm_op.register_autograd(
    lambda ctx, dy, dmean, drstd: _LayerNorm.backward(ctx, dy), setup_context=_setup
)
_add_layer_norm_op.register_autograd(
    lambda ctx, dy, dtotal, dmean, drstd: _AddLayerNorm.backward(ctx, dy, dtotal),
    setup_context=_setup_add,
)
