"""Causal attention, from the projections' [B, H, T, D] views to the joined heads, [B, T, H * D]."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import ops, reference
from fastgpt.bench.case import PEERS, Case, both_ways

SHAPES = ((8, 12, 8, 64), (8, 12, 128, 64), (1, 12, 256, 64), (1, 12, 1024, 64))


def causal_attention(B: int, H: int, T: int, D: int) -> Case:
    q, k, v = (torch.randn(B, T, H, D).transpose(1, 2) for _ in range(3))
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)

    def join(heads: Tensor) -> Tensor:
        return heads.transpose(1, 2).reshape(B, T, H * D)

    def book(q, k, v):
        return join(reference.causal_attention(q, k, v, mask))

    compiled = torch.compile(book, dynamic=False)
    return Case(
        {
            "reference": lambda: book(q, k, v),
            "torch": lambda: join(F.scaled_dot_product_attention(q, k, v, is_causal=True)),
            "compile": lambda: compiled(q, k, v),
            "fastgpt": lambda: join(ops.causal_attention(q, k, v)),
        },
        exact=book(q.double(), k.double(), v.double()),
    )


def causal_attention_backward(B: int, H: int, T: int, D: int) -> Case:
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)

    def book(q, k, v):
        return reference.causal_attention(q, k, v, mask)

    return both_ways(
        {
            "reference": book,
            "torch": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "compile": torch.compile(book, dynamic=False),
            "fastgpt": ops.causal_attention,
        },
        [torch.randn(B, T, H, D).transpose(1, 2) for _ in range(3)],
    )


CASES = {
    f"{build.__name__} {list(shape)}": partial(build, *shape)
    for build in (causal_attention, causal_attention_backward)
    for shape in SHAPES
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", CASES)
def test_causal_attention(measure, name, peer):
    measure(name, CASES[name], peer)
