"""Token and position embeddings of GPT-2 and their gradients, [B, T] ids to [B, T, 768]."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import ops
from fastgpt.bench.case import Case, both_ways

VOCABULARY, CONTEXT, WIDTH = 50257, 1024, 768
SHAPES = ((2, 512), (8, 1024))
PEERS = ("reference", "compile", "fastgpt")


def embedding_backward(B: int, T: int) -> Case:
    idx = torch.randint(VOCABULARY, (B, T))

    def book(tok: Tensor, pos: Tensor) -> Tensor:
        return F.embedding(idx, tok) + F.embedding(torch.arange(T), pos)

    return both_ways(
        {
            "reference": book,
            "compile": torch.compile(book, dynamic=False),
            "fastgpt": lambda tok, pos: ops.embedding(idx, tok, pos),
        },
        [torch.randn(VOCABULARY, WIDTH), torch.randn(CONTEXT, WIDTH)],
    )


CASES = {
    f"embedding_backward {list(shape)}": partial(embedding_backward, *shape) for shape in SHAPES
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", CASES)
def test_embedding(measure, name, peer):
    measure(name, CASES[name], peer)
