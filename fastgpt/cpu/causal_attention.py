"""Causal attention on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.cpu import _C
from fastgpt.cpu.records import data


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> None:
    """Writes out = dropout(softmax(scale q k^T, causal)) v and, into lse, of each row of scores the
    greatest and the sum of exponentials, whose logarithm would round off what backward needs.

    q, out: [B, H, T, D]; k, v: [B, H, S, D] with S >= T, query i seeing the keys up to i + S - T;
    any strides but 1 along D. lse: [B, H, T, 2] contiguous. All float32.
    """
    if out.numel() == 0:
        return
    _C.causal_attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        data(lse),
        scale,
        _shape(q, k, v, out),
        seed,
        dropout_p,
        torch.get_num_threads(),
    )


def causal_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> None:
    """Writes dq, dk and dv, from what ``causal_attention`` took and gave; shapes and strides as
    there.
    """
    if out.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    _C.causal_attention_backward(
        [t.data_ptr() for t in (q, k, v, out, dout, lse, dq, dk, dv)],
        scale,
        _shape(q, k, v, out),
        _shape(dq, dk, dv, dout),
        seed,
        dropout_p,
        torch.get_num_threads(),
    )


def _shape(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> list[int]:
    """struct AttentionShape."""
    B, H, T, D = q.shape
    return [B, H, T, k.shape[2], D, *(n for t in (q, k, v, out) for n in t.stride()[:3])]
