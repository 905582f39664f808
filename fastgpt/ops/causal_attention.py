"""Causal scaled dot-product attention that holds no block of queries x keys (Dao, arXiv
2307.08691).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch
from fastgpt.cpu import causal_attention as cpu


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v, where query i sees the keys up to i + S - T.

    Args:
        q: [B, H, T, D], any floating dtype, any strides.
        k: [B, H, S, D] with S >= T.
        v: [B, H, S, D].
        scale: of the scores; 1 / sqrt(D) if None.

    Returns:
        [B, H, T, D], a transposed view of [B, T, H, D], so that joining the heads copies nothing.

    Raises:
        ValueError: the shapes do not fit each other.
        BackendError: a backend asked for by name cannot take these tensors.
    """
    fits = q.dim() == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2]
    if not fits or q.shape[3] != k.shape[3] or q.shape[2] > k.shape[2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q [B, H, T, D], k and v [B, H, S >= T, D] do not fit: {shapes}")
    if scale is None:
        scale = q.shape[3] ** -0.5
    if torch.compiler.is_compiling():
        if dispatch.traceable(q, k, v):
            return torch.ops.fastgpt.causal_attention(q, k, v, scale).transpose(1, 2)
        return _torch(q, k, v, scale)
    if dispatch.choose("causal_attention", q, k, v) == "reference":
        return _torch(q, k, v, scale)
    if dispatch.needs_grad(q, k, v):
        return _CausalAttention.apply(q, k, v, scale).transpose(1, 2)
    return _forward(q, k, v, scale).transpose(1, 2)


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    T, S = q.shape[2], k.shape[2]
    if dispatch.transformed():  # the fused operation has no forward mode and no batching rule
        return _weights(q, k, scale) @ v
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Returns [B, T, H, D]."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    B, H, T, D = q.shape
    out = q.new_empty(B, T, H, D)
    cpu.causal_attention(q, k, v, scale, out.transpose(1, 2))
    return out


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[B, H, T, S], by PyTorch's differentiable operations."""
    T, S = q.shape[2], k.shape[2]
    hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    return torch.softmax((q @ k.mT * scale).masked_fill(hidden, -torch.inf), dim=-1)


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Gradients of q, k, v by the plain formulas, differentiable themselves. dout: [B, T, H, D]."""
    weights = _weights(q, k, scale)
    dout = dout.transpose(1, 2)
    dweights = dout @ v.mT
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * scale
    return dscores @ k, dscores.mT @ q, weights.mT @ dout


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return _forward(q, k, v, scale)

    @staticmethod
    def backward(ctx, dout):
        q, k, v = ctx.saved_tensors
        return *_backward(dout, q, k, v, ctx.scale), None


@torch.library.custom_op("fastgpt::causal_attention", mutates_args=())
def _causal_attention_op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if dispatch.choose("causal_attention", q, k, v) == "reference":
        return _torch(q, k, v, scale).transpose(1, 2).contiguous()
    return _forward(q, k, v, scale)


@_causal_attention_op.register_fake
def _(q, k, v, scale):
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D)


def _setup(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


_causal_attention_op.register_autograd(_CausalAttention.backward, setup_context=_setup)
