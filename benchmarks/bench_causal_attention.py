"""Causal attention, from the projections' [B, H, T, D] views to the joined heads, [B, T, H * D]."""

import torch
from torch.nn import functional as F

from benchmarks.cases import benchmark_of, gradients, outputs
from fastgpt import ops, reference

SIZES = [(8, 12, 8, 64), (8, 12, 128, 64), (1, 12, 256, 64), (1, 12, 1024, 64)]


def causal_attention(B, H, T, D):
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)

    def joined(attention):
        return lambda q, k, v: attention(q, k, v).transpose(1, 2).reshape(B, T, H * D)

    forms = {
        "reference": joined(lambda q, k, v: reference.causal_attention(q, k, v, mask)),
        "torch": joined(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        "fastgpt": joined(ops.causal_attention),
    }
    return forms, [torch.randn(B, T, H, D).transpose(1, 2) for _ in range(3)]


CASES = outputs(causal_attention, SIZES) | gradients(causal_attention, SIZES)
test_causal_attention = benchmark_of(CASES)
