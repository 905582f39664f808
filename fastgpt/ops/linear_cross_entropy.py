"""The cross entropy of a linear head without its logits, which would be the largest thing in a
training step: chunks of rows, and the gradients out of the same chunk, as in Liger (Hsu et al.,
arXiv 2410.10989).
"""

from __future__ import annotations

import threading
from math import nan

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
    if torch.compiler.is_compiling() or not dispatch.direct((rows, weight)):
        dispatch.check_invariance("linear_cross_entropy", "it is watched or transformed")
        raise_wrong_ids(targets)  # PyTorch's loss would end the process's use of the GPU
        loss = _differentiable(rows, weight, labels, *rest)
    else:
        if dispatch.autocasts(x):
            dtype = torch.get_autocast_dtype(x.device.type)
            rows, weight = rows.to(dtype), weight.to(dtype)
        kernels = dispatch.kernels("linear_cross_entropy", rows, weight)
        takes = kernels is not None and kernels.takes(weight, None)
        if not takes:
            dispatch.check_invariance(
                "linear_cross_entropy", "its weight is too deep, or an odd view"
            )
        run = dispatch.first(kernels.linear_cross_entropy, _by_chunks) if takes else _by_chunks
        if dispatch.needs_grad(rows, weight):
            loss = _LinearCrossEntropy.apply(run, rows, weight, labels, *rest, owner)
        else:
            loss = _forward(run, rows, weight, labels, *rest, owner)
    return loss.view(targets.shape) if reduction == "none" else loss


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
        ctx.grads = None
        if reduction != "none" and x.dtype != torch.float16:
            ctx.grads = _gradients(x, weight, ctx.needs_input_grad[1:3])
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
            grads, upstream = _gradients(x, weight, wanted), _upstream(dloss, targets, *ctx.rest)
            loss, x, ignore_index = torch.empty_like(upstream), x.contiguous(), ctx.rest[0]
            ctx.run(x, weight, targets, ignore_index, loss, upstream, *grads, owner=ctx.owner)
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
    kept = torch.float64 if x.dtype == torch.float64 else torch.float32
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


def _upstream(dloss, targets, ignore_index, reduction):
    """The gradient of each row's loss, [N]."""
    if reduction == "mean":
        dloss = dloss / (targets != ignore_index).sum()
    return dloss.expand(targets.shape).contiguous()


def _gradients(x, weight, wanted):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
    return [dx, gradient_like(weight) if wanted[1] else None]
