"""Causal scaled dot-product attention that holds no block of queries x keys (Dao, arXiv
2307.08691).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch, torch_state
from fastgpt.ops.dropout import dropout
from fastgpt.ops.dropout_seed import check_probability, draw_seed
from fastgpt.ops.mask_again import mask_again
from fastgpt.triton import vendor


@dispatch.falls_back
def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """dropout(softmax(scale q k^T)) v, where query i sees the keys up to i + S - T.

    Args:
        q: [B, H, T, D], any floating dtype, any strides.
        k: [B, H, S, D] with S >= T.
        v: [B, H, S, D].
        scale: of the scores; 1 / sqrt(D) if None.
        dropout_p: probability of dropping a weight; the others are scaled by 1 / (1 - p). Draws one
            number from torch's generator for the device if not 0.

    Returns:
        [B, H, T, D], a transposed view of [B, T, H, D], so that joining the heads copies nothing.

    Raises:
        ValueError: the shapes do not fit each other, or dropout_p is not a probability.
        BackendError: a backend asked for by name cannot take these tensors.
    """
    fits = q.dim() == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2]
    if not fits or q.shape[3] != k.shape[3] or q.shape[2] > k.shape[2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q [B, H, T, D], k and v [B, H, S >= T, D] do not fit: {shapes}")
    check_probability(dropout_p)
    if scale is None:
        scale = q.shape[3] ** -0.5
    if torch.compiler.is_compiling():
        # On a GPU PyTorch chooses among the vendor's kernels for what they take.
        ours = not q.is_cuda or 1 < q.shape[2] < k.shape[2]
        if dropout_p == 0 and ours and dispatch.traceable("causal_attention", q, k, v):
            return torch.ops.fastgpt.causal_attention(q, k, v, scale)[0].transpose(1, 2)
        return _torch(q, k, v, scale, dropout_p)
    backend = dispatch.choose("causal_attention", q, k, v)
    theirs = None
    if backend == "triton" and scale > 0:
        theirs = vendor.vendor_attention(q, k, v, dropout_p)
    if backend == "reference" or theirs is not None:
        return _torch(q, k, v, scale, dropout_p, theirs)
    kernels = dispatch.module(backend, "causal_attention", q)
    drop = (dropout_p, draw_seed(q.device, dropout_p))
    if dispatch.needs_grad(q, k, v):
        return _CausalAttention.apply(kernels, q, k, v, scale, *drop).transpose(1, 2)
    return _forward(kernels, q, k, v, scale, *drop, keep=False)[0].transpose(1, 2)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, theirs: str | None = None
) -> Tensor:
    """By PyTorch's operation; theirs: as ``vendor.vendor_attention`` says it."""
    T, S = q.shape[2], k.shape[2]
    if theirs in ("flash", "efficient"):
        return torch_state.sdpa_kernel(theirs, q, k, v, scale, dropout_p)
    # PyTorch's fused operation has no forward mode, no batching rule and a mask of its own, and
    # multiplies the infinity of the causal one by a scale of 0.
    if dispatch.transformed() or (dropout_p > 0 and not q.is_cuda) or scale == 0:
        return dropout(weights(q, k, scale), dropout_p) @ v
    if T == 1:  # one query sees every key
        mask: dict[str, Any] = {}
    elif T == S:
        mask = {"is_causal": True}
    else:
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        mask = {"attn_mask": seen}
    return F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout_p, **mask)


def _rows(*tensors: Tensor) -> list[Tensor]:
    """As the kernels read them: neighbours along D are adjacent."""
    return [t if t.stride(3) == 1 else t.contiguous() for t in tensors]


def _statistics(q: Tensor) -> Tensor:
    """Empty, for what the device's kernels keep of the softmax: of each row the greatest score and
    the sum, [B, H, T, 2], or the log-sum-exp, [B, H, T].
    """
    shape = (*q.shape[:3], 2) if q.device.type == "cpu" else q.shape[:3]
    return q.new_empty(shape, dtype=torch.float32)


def _forward(kernels, q, k, v, scale, dropout_p=0.0, seed=0, *, keep):
    """Returns [B, T, H, D] and, where it is kept for backward, ``_statistics``."""
    B, H, T, D = q.shape
    out = q.new_empty(B, T, H, D)
    lse = _statistics(q) if keep else None
    kernels.causal_attention(*_rows(q, k, v), scale, out.transpose(1, 2), lse, dropout_p, seed)
    return out, lse


def _backward(kernels, dout, q, k, v, out, lse, scale, dropout_p=0.0, seed=0):
    """Gradients of q, k, v. dout, out: [B, T, H, D]."""
    grads = _gradients(q, k, v)
    (dout,) = _rows(dout.transpose(1, 2))
    kernels.causal_attention_backward(
        dout, *_rows(q, k, v), out.transpose(1, 2), lse, scale, *grads, dropout_p, seed
    )
    return tuple(grads)


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Empty, laid out as the projections that they go to have them: [B, T, H, D], or, where q, k
    and v are parts of one product, parts of a block [B, T, 3, H, D].
    """
    B, H, T, D = q.shape
    part, strides = H * D * q.element_size(), (T * 3 * H * D, D, 3 * H * D, 1)
    if all(
        t.shape == q.shape and t.stride() == strides and t.data_ptr() == q.data_ptr() + i * part
        for i, t in enumerate((q, k, v))
    ):
        block = q.new_empty(B, T, 3, H, D)
        return [t.transpose(1, 2) for t in block.unbind(2)]
    return [t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v)]


def weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[B, H, T, S], by PyTorch's differentiable operations."""
    T, S = q.shape[2], k.shape[2]
    hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    return torch.softmax((q @ k.mT * scale).masked_fill(hidden, -torch.inf), dim=-1)


def _formulas(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v by operations that are differentiable themselves, with a block of
    queries x keys. dout: [B, T, H, D]; keep: what dropout multiplied the weights by.
    """
    p = weights(q, k, scale)
    dout = dout.transpose(1, 2)
    dp = dout @ v.mT
    kept = p
    if keep is not None:
        keep = keep.to(p.dtype)
        kept, dp = p * keep, dp * keep
    dscores = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    return dscores @ k, dscores.mT @ q, kept.mT @ dout


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, q, k, v, scale, dropout_p, seed):
        out, lse = _forward(kernels, q, k, v, scale, dropout_p, seed, keep=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernels, ctx.scale, ctx.drop = kernels, scale, (dropout_p, seed)
        return out

    @staticmethod
    @dispatch.falls_back
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        if dispatch.first_order(ctx.kernels, dout):
            grads = _backward(ctx.kernels, dout, q, k, v, out, lse, ctx.scale, *ctx.drop)
        else:
            shape = (*q.shape[:3], k.shape[2])
            keep = mask_again(ctx.kernels, ctx.drop, shape, q.device)
            grads = _formulas(dout, q, k, v, ctx.scale, keep)
        return None, *grads, None, None, None


@torch.library.custom_op("fastgpt::causal_attention", mutates_args=())
@dispatch.falls_back
def _causal_attention_op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    kernels = dispatch.kernels("causal_attention", q, k, v)
    if kernels is None:
        out = _torch(q, k, v, scale, 0.0).transpose(1, 2).contiguous()
        return out, _statistics(q).zero_()
    return _forward(kernels, q, k, v, scale, keep=True)


@_causal_attention_op.register_fake
def _(q, k, v, scale):
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D), _statistics(q)


@torch.library.custom_op("fastgpt::causal_attention_backward", mutates_args=())
@dispatch.falls_back
def _causal_attention_backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = dispatch.kernels("causal_attention", q, k, v)
    if kernels is None:
        grads = _formulas(dout, q, k, v, scale)
    else:
        grads = _backward(kernels, dout, q, k, v, out, lse, scale)
    return tuple(t.contiguous() for t in grads)  # type: ignore[return-value]


@_causal_attention_backward_op.register_fake
def _(dout, q, k, v, out, lse, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _op_backward(ctx, dout, dlse):
    saved = ctx.saved_tensors
    return *torch.ops.fastgpt.causal_attention_backward(dout, *saved, ctx.scale), None


_causal_attention_op.register_autograd(_op_backward, setup_context=_setup)
