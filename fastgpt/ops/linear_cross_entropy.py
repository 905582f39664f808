"""The cross entropy of a linear head without its logits, which would be the largest thing in a
training step: chunks of rows, and the gradients out of the same chunk, as in Liger (Hsu et al.,
arXiv 2410.10989).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch
from fastgpt.cpu.records import gradient_like

_CHUNK = 512  # rows whose logits PyTorch's own form holds at a time


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    owner: object | None = None,
) -> Tensor:
    """cross_entropy(x W^T, targets); no [..., V] block exists.

    Args:
        x: [..., D], any floating dtype.
        weight: [V, D].
        targets: [...], integers.
        ignore_index: targets of this value cost nothing and do not count.
        reduction: "mean" over the targets that count, "sum" or "none".
        owner: what the scratch memory is kept with between calls, say the model; with none it goes
            with the call.

    Returns:
        A scalar, or [...] for "none"; float64 for float64, else float32.

    Raises:
        ValueError: the shapes do not fit each other, the targets are on another device, or the
            reduction is none of these.
        TypeError: the targets are not integers.
        IndexError: a target is outside the vocabulary.
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
    rows, labels = x.reshape(-1, x.shape[-1]), targets.reshape(-1).long()
    if torch.compiler.is_compiling() or dispatch.transformed():
        loss = _differentiable(rows, weight, labels, ignore_index, reduction)
    else:
        if dispatch.autocasts(x):
            dtype = torch.get_autocast_dtype(x.device.type)
            rows, weight = rows.to(dtype), weight.to(dtype)
        kernels = dispatch.kernels("linear_cross_entropy", rows, weight)
        takes = kernels is not None and kernels.takes(weight, None)
        run = dispatch.first(kernels.linear_cross_entropy, _by_chunks) if takes else _by_chunks
        loss = _LinearCrossEntropy.apply(
            run, rows, weight, labels.contiguous(), ignore_index, reduction, owner
        )
    return loss.view(targets.shape) if reduction == "none" else loss


def check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """
    Raises:
        TypeError: the targets are not integers.
        IndexError: one that counts is outside the vocabulary; the message names it.
    """
    if targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    if targets.numel() == 0 or not dispatch.readable(targets):
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
    if dweight is not None:
        dweight.zero_()
    for at in range(0, x.shape[0], _CHUNK):
        part = slice(at, at + _CHUNK)
        logits = (x[part] @ weight.mT).to(loss.dtype)
        counts = targets[part] != ignore_index
        labels = targets[part].where(counts, 0)[:, None]
        lse = logits.logsumexp(1)
        loss[part] = (lse - logits.gather(1, labels)[:, 0]).where(counts, 0)
        if upstream is None:
            continue
        scale = upstream[part].where(counts, 0)[:, None]
        dlogits = logits.sub_(lse[:, None]).exp_().mul_(scale)
        dlogits = dlogits.where(counts[:, None], 0).scatter_add_(1, labels, -scale).to(x.dtype)
        if dx is not None:
            dx[part] = dlogits @ weight
        if dweight is not None:
            dweight.addmm_(dlogits.mT, x[part])


class _LinearCrossEntropy(torch.autograd.Function):
    """For a mean or a sum every row's gradient is known up to one factor, so forward makes the
    gradients while it has the logits; backward multiplies. Else backward makes the logits again.
    """

    @staticmethod
    def forward(ctx, run, x, weight, targets, ignore_index, reduction, owner):
        ctx.run, ctx.owner = run, owner
        ctx.rest = (ignore_index, reduction)
        ctx.save_for_backward(x, weight, targets)
        x, N = x.contiguous(), x.shape[0]
        kept = torch.float64 if x.dtype == torch.float64 else torch.float32
        loss = torch.empty(N, dtype=kept, device=x.device)
        if reduction == "none":
            run(x, weight, targets, ignore_index, loss, owner=owner)
            return loss
        one = torch.ones((), dtype=kept, device=x.device)
        share = one / (targets != ignore_index).sum() if reduction == "mean" else one
        # Rows' shares of a mean underflow in float16; there they come in with dloss.
        ctx.factor = share if x.dtype == torch.float16 else None
        wanted = ctx.needs_input_grad[1:3]
        ctx.grads = _gradients(x, weight, wanted)
        upstream = None
        if any(wanted):
            upstream = (share if ctx.factor is None else one).expand(N).contiguous()
        run(x, weight, targets, ignore_index, loss, upstream, *ctx.grads, owner=owner)
        # In float64, so that a mean of many rows is as exact as one of few.
        total = loss.sum(dtype=torch.float64)
        return (total * share if reduction == "mean" else total).to(kept)

    @staticmethod
    def backward(ctx, dloss):
        ignore_index, reduction = ctx.rest
        wanted = ctx.needs_input_grad[1:3]
        if not dispatch.once(None, dloss):
            x, weight, targets = ctx.saved_tensors
            with torch.enable_grad():
                loss = _differentiable(x, weight, targets, ignore_index, reduction)
                inputs = [t for t, want in zip((x, weight), wanted, strict=True) if want]
                found = iter(torch.autograd.grad(loss, inputs, dloss, create_graph=True))
            grads = [next(found) if want else None for want in wanted]
        elif reduction == "none" or ctx.grads is None:
            x, weight, targets = ctx.saved_tensors
            if reduction == "none":
                upstream = dloss.contiguous()
            else:
                share = dloss / (targets != ignore_index).sum() if reduction == "mean" else dloss
                upstream = share.expand(x.shape[0]).contiguous()
            grads = _gradients(x, weight, wanted)
            loss = torch.empty_like(upstream)
            x = x.contiguous()
            ctx.run(x, weight, targets, ignore_index, loss, upstream, *grads, owner=ctx.owner)
        else:
            # Handed over, so that autograd keeps them without a copy; a second pass makes new ones.
            grads, ctx.grads = ctx.grads, None
            if ctx.factor is not None:
                dloss = dloss * ctx.factor
            if dloss.device.type != "cpu" or dloss.item() != 1:
                for grad in grads:
                    if grad is not None:
                        grad.mul_(dloss)
        return None, *grads, None, None, None, None


def _gradients(x, weight, wanted):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
    return [dx, gradient_like(weight) if wanted[1] else None]
