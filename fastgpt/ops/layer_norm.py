"""LayerNorm over the last dimension, with or without a residual add in front (Ba et al., arXiv
1607.06450).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch, reference
from fastgpt.ops.dropout import dropout
from fastgpt.ops.dropout_seed import draw_seed
from fastgpt.ops.mask_again import mask_again


@dispatch.falls_back
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """weight * (x - mean) / sqrt(var + eps) + bias, mean and biased variance over the last
    dimension.

    Args:
        x: [..., D], any floating dtype.
        weight: [D].
        bias: [D].
        eps: added to the variance.

    Returns:
        [..., D], in the dtype that x, weight and bias promote to. Where D is 1 on one side alone,
        that side is expanded, as the book's is.

    Raises:
        ValueError: weight or bias is not [D].
        BackendError: a backend asked for by name cannot take these tensors.
    """
    if x.shape[-1:] != weight.shape and 1 in (x.shape[-1:].numel(), weight.numel()):
        return reference.layer_norm(x, weight, bias, eps)
    _check(x, weight, bias)
    if torch.compiler.is_compiling():  # whose own kernel is as fast, and fuses with its neighbours
        return _torch(x, weight, bias, eps)
    kernels = dispatch.kernels("layer_norm", x, weight, bias)
    if kernels is None:
        return _torch(x, weight, bias, eps)
    if dispatch.needs_grad(x, weight, bias):
        return _LayerNorm.apply(kernels, x, weight, bias, eps)
    return _forward(kernels, x, weight, bias, eps, stats=False)[0]


@dispatch.falls_back
def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    narrow: bool = False,
) -> tuple[Tensor, Tensor]:
    """The residual add and the LayerNorm after it, in one pass: with total = x + dropout(branch),
    (layer_norm(total), total).

    Args:
        x: [..., D], the residual stream, any floating dtype.
        branch: the shape of x, what is added to it.
        weight: [D].
        bias: [D].
        eps: added to the variance.
        dropout_p: probability of dropping an element of the branch; the others are scaled by
            1 / (1 - p). Draws one number from torch's generator for the device if not 0.
        narrow: whether nothing but products read the normalised sum, so that under autocast a GPU
            kernel may write it in their dtype at once.

    Returns:
        The normalised sum and the sum, each [..., D].

    Raises:
        ValueError: branch has another shape than x, weight or bias is not [D], or dropout_p is not
            a probability.
        BackendError: a backend asked for by name cannot take these tensors.
    """
    _check(x, weight, bias)
    if branch.shape != x.shape:
        raise ValueError(f"branch {tuple(branch.shape)} must have the shape of x {tuple(x.shape)}")
    if torch.compiler.is_compiling():
        return _torch_add(x, branch, weight, bias, eps, dropout_p)
    kernels = _kernels_add(x, branch, weight, bias)
    if kernels is None:
        return _torch_add(x, branch, weight, bias, eps, dropout_p)
    narrow = narrow and isinstance(kernels, dispatch.Launchers)
    dtype = dispatch.autocast_dtype(x) if narrow else None
    how = (dtype or weight.dtype, dropout_p, draw_seed(x.device, dropout_p))
    if dispatch.needs_grad(x, branch, weight, bias):
        return _AddLayerNorm.apply(kernels, x, branch, weight, bias, eps, *how)
    y, total, _, _ = _forward_add(kernels, x, branch, weight, bias, eps, *how, stats=False)
    return y, total


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be [D] "
            f"for x {tuple(x.shape)}"
        )


def _torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.dtype == weight.dtype == bias.dtype:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return reference.layer_norm(x, weight, bias, eps)  # promotes mixed dtypes as the book's does


def _torch_add(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    total = x + dropout(branch, dropout_p)
    return _torch(total, weight, bias, eps), total


def _kernels_add(x, branch, weight, bias):
    """The sum has the dtype of x or of the branch; under autocast the branch is the narrow one."""
    total = x if torch.promote_types(x.dtype, branch.dtype) == x.dtype else branch
    return dispatch.kernels("layer_norm", total, weight, bias, beside=(x, branch))


def _stats(x: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    if not wanted:
        return None, None
    mean = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    return mean, torch.empty_like(mean)


def _forward(kernels, x, weight, bias, eps, stats):
    x = x.contiguous()
    y = torch.empty_like(x)
    mean, rstd = _stats(x, stats)
    kernels.layer_norm(x, weight.contiguous(), bias.contiguous(), eps, y, mean, rstd)
    return y, mean, rstd


def _forward_add(kernels, x, branch, weight, bias, eps, dtype, dropout_p, seed, stats):
    x, branch = x.contiguous(), branch.contiguous()
    y, total = (torch.empty_like(x, dtype=d) for d in (dtype, weight.dtype))
    mean, rstd = _stats(x, stats)
    weight, bias = weight.contiguous(), bias.contiguous()
    kernels.layer_norm(x, weight, bias, eps, y, mean, rstd, branch, total, dropout_p, seed)
    return y, total, mean, rstd


def _formulas(dy, saved, wanted):
    """The gradients of x, weight and bias by an operation that is differentiable itself."""
    x, mean, rstd, weight, bias = saved
    wide = [t.to(mean.dtype) for t in (dy, x, weight, bias)]  # the statistics are float32
    found = torch.ops.aten.native_layer_norm_backward(
        *wide[:2], x.shape[-1:], mean, rstd, *wide[2:], list(wanted)
    )
    return [
        g if g is None else g.to(t.dtype) for g, t in zip(found, (x, weight, bias), strict=True)
    ]


def _backward(kernels, dy, saved, wanted, dtotal=None, branch=None, dropout_p=0.0, seed=0):
    """The gradients of the normalised x, of the branch behind its dropout, of weight and bias.

    branch: the branch's dtype, where there is one.
    """
    x, mean, rstd, weight, _ = saved
    x = x.contiguous()
    dx = torch.empty_like(x) if wanted[0] else None
    dbranch = None
    if wanted[0] and (dropout_p > 0 or branch not in (None, x.dtype)):
        dbranch = torch.empty_like(x, dtype=branch)
    dw = db = None
    if wanted[1] or wanted[2]:
        dw, db = (weight.new_empty(weight.shape) for _ in range(2))
    if dtotal is not None:
        dtotal = dtotal.contiguous()
    weight = weight.contiguous()
    kernels.layer_norm_backward(
        dy.contiguous(), x, weight, mean, rstd, dx, dw, db, dtotal, dbranch, dropout_p, seed
    )
    if dbranch is None:
        dbranch = dx
    return dx, dbranch, dw if wanted[1] else None, db if wanted[2] else None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, weight, bias, eps):
        y, mean, rstd = _forward(kernels, x, weight, bias, eps, stats=True)
        # A bias's values are not needed: through .data it may change before backward.
        ctx.save_for_backward(x, mean, rstd, weight, bias.data)
        ctx.kernels = kernels
        return y

    @staticmethod
    @dispatch.falls_back
    def backward(ctx, dy):
        wanted = ctx.needs_input_grad[1:4]
        if dispatch.first_order(ctx.kernels, dy):
            dx, _, dw, db = _backward(ctx.kernels, dy, ctx.saved_tensors, wanted)
        else:
            dx, dw, db = _formulas(dy, ctx.saved_tensors, wanted)
        return None, dx, dw, db, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, branch, weight, bias, eps, dtype, dropout_p, seed):
        y, total, mean, rstd = _forward_add(
            kernels, x, branch, weight, bias, eps, dtype, dropout_p, seed, stats=True
        )
        ctx.save_for_backward(total, mean, rstd, weight, bias.data)
        ctx.kernels, ctx.branch, ctx.drop = kernels, branch.dtype, (dropout_p, seed)
        return y, total

    @staticmethod
    @dispatch.falls_back
    def backward(ctx, dy, dtotal):
        _, *wanted = ctx.needs_input_grad[:5]
        stream = (wanted[0] or wanted[1], wanted[2], wanted[3])
        if dispatch.first_order(ctx.kernels, dy, dtotal):
            into = (dtotal, ctx.branch, *ctx.drop)
            grads = _backward(ctx.kernels, dy, ctx.saved_tensors, stream, *into)
        else:
            keep = mask_again(ctx.kernels, ctx.drop, dy.shape, dy.device)
            grads = _add_formulas(dy, dtotal, ctx.saved_tensors, stream, keep)
        kept = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return None, *kept, None, None, None, None


def _add_formulas(dy, dtotal, saved, wanted, keep=None):
    dx, dw, db = _formulas(dy, saved, wanted)
    dx = dx if dx is None else dx + dtotal
    return dx, dx if dx is None or keep is None else dx * keep, dw, db
