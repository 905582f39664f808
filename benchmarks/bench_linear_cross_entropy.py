"""The loss of GPT-2's head, [rows, 768] by [50257, 768], with its gradients."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import ops
from fastgpt.bench.case import Case, both_ways

WIDTH, VOCABULARY = 768, 50257
ROWS = (64, 1024)
PEERS = ("reference", "compile", "fastgpt")


def linear_cross_entropy_backward(rows: int) -> Case:
    targets, owner = torch.randint(VOCABULARY, (rows,)), torch.nn.Module()

    def book(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), targets)

    return both_ways(
        {
            "reference": book,
            "compile": torch.compile(book, dynamic=False),
            "fastgpt": lambda x, w: ops.linear_cross_entropy(x, w, targets, owner=owner),
        },
        [torch.randn(rows, WIDTH), torch.randn(VOCABULARY, WIDTH) * 0.02],
    )


CASES = {
    f"linear_cross_entropy_backward [{rows}, {WIDTH}]": partial(linear_cross_entropy_backward, rows)
    for rows in ROWS
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", CASES)
def test_linear_cross_entropy(measure, name, peer):
    measure(name, CASES[name], peer)
