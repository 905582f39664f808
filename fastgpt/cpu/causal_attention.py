"""Causal attention on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.cpu import _C


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor | None = None
) -> None:
    """Writes out = softmax(scale q k^T, causal) v and the log-sum-exp of each row of scores.

    q, out: [B, H, T, D]; k, v: [B, H, S, D] with S >= T, query i seeing the keys up to i + S - T;
    any strides but 1 along D. lse: [B, H, T] contiguous. All float32.
    """
    if out.numel() == 0:
        return
    B, H, T, D = q.shape
    _C.causal_attention(
        q.data_ptr(),
        q.stride()[:3],
        k.data_ptr(),
        k.stride()[:3],
        v.data_ptr(),
        v.stride()[:3],
        out.data_ptr(),
        out.stride()[:3],
        lse.data_ptr() if lse is not None else 0,
        B,
        H,
        T,
        k.shape[2],
        D,
        scale,
        torch.get_num_threads(),
    )
