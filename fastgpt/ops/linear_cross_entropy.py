"""The cross entropy of a linear head without its logits, which would be the largest thing in a
training step: chunks of rows, and the gradients out of the same chunk, as in Liger (Hsu et al.,
arXiv 2410.10989).
"""

from __future__ import annotations

import threading
from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch
from fastgpt.cpu.records import gradient_like
from fastgpt.ops.id_check import check_on_gpu, raise_wrong_ids

_CHUNK = 512  # rows whose logits PyTorch's own form holds at a time


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    owner: object | None = None,
) -> Tensor:
    """cross_entropy(x W^T, targets); no [..., V] block exists, unless the weight is a subclass of
    Tensor, which must multiply by itself.

    Args:
        x: [..., D], any floating dtype.
        weight: [V, D].
        targets: [...], integers.
        ignore_index: targets of this value cost nothing and do not count.
        reduction: "mean" over the targets that count, "sum" or "none".
        owner: keeps the scratch memory between calls, such as the model; without one it goes with
            the call.

    Returns:
        A scalar, or [...] for "none"; float64 for float64, else float32.

    Raises:
        ValueError: the shapes do not fit each other, the targets are on another device, or the
            reduction is none of these.
        TypeError: the targets are not integers.
        IndexError: a target is outside the vocabulary; of a training step on our GPU kernels the
            next step raises it, and the loss is NaN.
        BackendError: a backend asked for by name cannot take these tensors.
    """
    if targets.device != x.device:
        raise ValueError(f"the targets are on {targets.device}, x is on {x.device}")
    check_targets(targets, weight.shape[0], ignore_index)
    return checked_linear_cross_entropy(x, weight, targets, ignore_index, reduction, owner)


def checked_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    owner: object | None,
) -> Tensor:
    """``linear_cross_entropy`` for targets that ``check_targets`` has seen: on a GPU a second look
    would wait for all that was computed in between.
    """
    if x.shape[-1:] != weight.shape[1:] or x.shape[:-1] != targets.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, targets))
        raise ValueError(f"x [..., D], weight [V, D] and targets [...] do not fit: {shapes}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction {reduction!r} must be "mean", "sum" or "none"')
    rows, labels = x.reshape(-1, x.shape[-1]), targets.reshape(-1).long().contiguous()
    rest = (ignore_index, reduction)
    if torch.compiler.is_compiling():
        narrow = _narrowed(rows), _narrowed(weight)
        if dispatch.traceable("linear_cross_entropy", *narrow):
            wanted = [torch.is_grad_enabled() and t.requires_grad for t in narrow]
            op = torch.ops.fastgpt.linear_cross_entropy
            loss = op(*narrow, labels, *rest, *wanted)[0]
        else:
            loss = _differentiable(rows, weight, labels, *rest)
    elif not dispatch.direct((rows, weight)):
        dispatch.check_invariance("linear_cross_entropy", "it is watched or transformed")
        raise_wrong_ids(targets)  # PyTorch's loss would end the process's use of the GPU
        loss = _differentiable(rows, weight, labels, *rest)
    else:
        rows, weight = _narrowed(rows), _narrowed(weight)
        run = _run(rows, weight)
        if dispatch.needs_grad(rows, weight):
            loss = _LinearCrossEntropy.apply(run, rows, weight, labels, *rest, owner)
        else:
            loss = _forward(run, rows, weight, labels, *rest, owner)
    return loss.view(targets.shape) if reduction == "none" else loss


def _narrowed(x: Tensor) -> Tensor:
    """In autocast's dtype, where it is on."""
    dtype = dispatch.autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def _run(rows: Tensor, weight: Tensor) -> Any:
    """What does the work of ``_by_chunks``."""
    kernels = dispatch.kernels("linear_cross_entropy", rows, weight)
    if kernels is not None and kernels.takes(weight, None):
        return dispatch.first(kernels.linear_cross_entropy, _by_chunks)
    dispatch.check_invariance("linear_cross_entropy", "its weight is too deep, or an odd view")
    return _by_chunks


def check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """
    Raises:
        TypeError: the targets are not integers.
        IndexError: one that counts is outside the vocabulary; the message names it. On a GPU, with
            gradients on, ``raise_wrong_ids`` raises it, or the next check.
    """
    if targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    if targets.numel() == 0 or not dispatch.readable(targets):
        return
    targets = targets.long()  # torch compares no uint16, uint32 or uint64
    if targets.is_cuda:
        check_on_gpu(targets, vocab_size, "target", ignore_index)
        return
    outside = (targets < 0) | (targets >= vocab_size)
    outside &= targets != ignore_index
    if outside.any():
        label = int(targets[outside][0])
        raise IndexError(f"target {label} is outside the vocabulary of {vocab_size}")


def _differentiable(x, weight, targets, ignore_index, reduction):
    logits = F.linear(x, weight)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


def _by_chunks(
    x, weight, targets, ignore_index, loss, upstream=None, dx=None, dweight=None, owner=None
):
    """What the kernels of this name do, in PyTorch's own operations."""
    total = dweight
    if dweight is not None and dweight.dtype != loss.dtype:
        # In a narrower dtype every chunk would add a rounding of the whole sum.
        total = torch.empty_like(dweight, dtype=loss.dtype)
    if total is not None:
        total.zero_()
    for at in range(0, x.shape[0], _CHUNK):
        part = slice(at, at + _CHUNK)
        logits = (x[part] @ weight.mT).to(loss.dtype)
        labels = targets[part]
        # A target outside the vocabulary gives NaN: on a GPU it is raised a step later.
        inside, counts = (labels >= 0) & (labels < weight.shape[0]), labels != ignore_index
        labels = labels.where(inside, 0)[:, None]
        logits -= logits.amax(1, keepdim=True)  # the loss may be small beside what it differs by
        lse = logits.logsumexp(1)
        loss[part] = (lse - logits.gather(1, labels)[:, 0]).where(inside, nan).where(counts, 0)
        if upstream is None:
            continue
        scale = upstream[part].where(inside, nan).where(counts, 0)[:, None]
        dlogits = logits.sub_(lse[:, None]).exp_().mul_(scale)
        dlogits = dlogits.where(counts[:, None], 0).scatter_add_(1, labels, -scale)
        if dx is not None:
            dx[part] = dlogits.to(x.dtype) @ weight
        if total is not None:
            total.addmm_(dlogits.mT, x[part].to(total.dtype))
    if total is not dweight:
        dweight.copy_(total)


class _LinearCrossEntropy(torch.autograd.Function):
    """For a mean or a sum every row's gradient is known up to one factor, so forward makes the
    gradients while it has the logits; backward multiplies. Without that factor they may overflow
    or underflow in float16: there, as for "none", backward makes the logits again.
    """

    @staticmethod
    def forward(ctx, run, x, weight, targets, ignore_index, reduction, owner):
        ctx.run, ctx.owner = run, owner
        ctx.thread = threading.current_thread()  # backward runs in one of PyTorch's
        ctx.rest = (ignore_index, reduction)
        ctx.save_for_backward(x, weight, targets)
        known = _known(x, reduction)
        ctx.grads = _gradients(x, weight, ctx.needs_input_grad[1:3]) if known else None
        return _forward(run, x, weight, targets, ignore_index, reduction, owner, ctx.grads)

    @staticmethod
    def backward(ctx, dloss):
        # Looked at even where the gradients are made: it refuses what has changed in between.
        x, weight, targets = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:3]
        first_order = dispatch.first_order(None, dloss)
        raise_wrong_ids(targets, ctx.thread, wait=not first_order)
        if not first_order:
            with torch.enable_grad():
                x, weight = x.view_as(x), weight.view_as(weight)  # x may come from the weight
                loss = _differentiable(x, weight, targets, *ctx.rest)
                inputs = [t for t, want in zip((x, weight), wanted, strict=True) if want]
                found = iter(torch.autograd.grad(loss, inputs, dloss, create_graph=True))
            grads = [next(found) if want else None for want in wanted]
        elif ctx.grads is None:
            grads = _backward(ctx.run, dloss, x, weight, targets, wanted, ctx.owner, *ctx.rest)
        else:
            # Handed over, so that autograd keeps them without a copy; a second pass makes new ones.
            grads, ctx.grads = ctx.grads, None
            if not dloss.is_cpu or dloss.item() != 1:
                for grad in grads:
                    if grad is not None:
                        grad.mul_(dloss)
        return None, *grads, None, None, None, None


def _forward(run, x, weight, targets, ignore_index, reduction, owner, grads=None):
    """Returns the loss; fills the gradients, where there are some, for a gradient of 1."""
    kept = _loss_dtype(x)
    loss, upstream = torch.empty(x.shape[0], dtype=kept, device=x.device), None
    if grads is not None:
        upstream = _upstream(loss.new_ones(()), targets, ignore_index, reduction)
    given = (upstream, *(grads or ()))
    run(x.contiguous(), weight, targets, ignore_index, loss, *given, owner=owner)
    if reduction == "none":
        return loss
    # In float64, which MPS lacks, so that a mean of many rows is as exact as one of few.
    total = loss.sum(dtype=kept if loss.is_mps else torch.float64)
    if reduction == "mean":
        total = total / (targets != ignore_index).sum()
    return total.to(kept)


def _backward(run, dloss, x, weight, targets, wanted, owner, ignore_index, reduction):
    """The gradients of x and weight, by the logits made again; None for one that is not wanted."""
    grads = _gradients(x, weight, wanted)
    upstream = _upstream(dloss, targets, ignore_index, reduction)
    loss, x = torch.empty_like(upstream), x.contiguous()
    run(x, weight, targets, ignore_index, loss, upstream, *grads, owner=owner)
    return grads


def _known(x: Tensor, reduction: str) -> bool:
    """Whether forward makes the gradients."""
    return reduction != "none" and x.dtype != torch.float16


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _upstream(dloss, targets, ignore_index, reduction):
    """The gradient of each row's loss, [N]."""
    if reduction == "mean":
        dloss = dloss / (targets != ignore_index).sum()
    return dloss.expand(targets.shape).contiguous()


def _gradients(x, weight, wanted):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
    return [dx, gradient_like(weight) if wanted[1] else None]


@torch.library.custom_op("fastgpt::linear_cross_entropy", mutates_args=())
@dispatch.falls_back
def _linear_cross_entropy_op(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    for_x: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the gradients of x and weight for one of 1; empty where backward makes them or
    they are not wanted.
    """
    wanted = for_x or for_weight
    grads = _gradients(x, weight, (for_x, for_weight)) if wanted and _known(x, reduction) else None
    rest = (targets, ignore_index, reduction)
    loss = _forward(_run(x, weight), x, weight, *rest, None, grads)
    return loss, *_filled(x, grads)


@_linear_cross_entropy_op.register_fake
def _(x, weight, targets, ignore_index, reduction, for_x, for_weight):
    wanted = (for_x, for_weight) if _known(x, reduction) else (False, False)
    loss = x.new_empty(targets.shape if reduction == "none" else (), dtype=_loss_dtype(x))
    return loss, *_filled(x, _gradients(x, weight, wanted))


@torch.library.custom_op("fastgpt::linear_cross_entropy_backward", mutates_args=())
@dispatch.falls_back
def _linear_cross_entropy_backward_op(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    for_x: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    rest = ((for_x, for_weight), None, ignore_index, reduction)
    grads = _backward(_run(x, weight), dloss, x, weight, targets, *rest)
    return _filled(x, grads)


@_linear_cross_entropy_backward_op.register_fake
def _(dloss, x, weight, targets, ignore_index, reduction, for_x, for_weight):
    return _filled(x, _gradients(x, weight, (for_x, for_weight)))


def _filled(x, grads):
    """An operation's results, which can't be None."""
    return tuple(x.new_empty(0) if g is None else g for g in grads or (None, None))


def _setup(ctx, inputs, output):
    *tensors, ctx.ignore_index, ctx.reduction, for_x, for_weight = inputs
    ctx.wanted = for_x, for_weight
    ctx.save_for_backward(*tensors, *output[1:])


def _op_backward(ctx, dloss, *_):
    x, weight, targets, *grads = ctx.saved_tensors
    if _known(x, ctx.reduction):
        grads = [g * dloss for g in grads]
    else:
        op = torch.ops.fastgpt.linear_cross_entropy_backward
        grads = op(dloss, x, weight, targets, ctx.ignore_index, ctx.reduction, *ctx.wanted)
    kept = (g if want else None for g, want in zip(grads, ctx.wanted, strict=True))
    return *kept, None, None, None, None, None


_linear_cross_entropy_op.register_autograd(_op_backward, setup_context=_setup)
