"""The loss of GPT-2's head, [rows, 768] by [50257, 768], alone as in evaluation, and with its
gradients.
"""

from collections.abc import Callable
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


def _forms(rows: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    targets, owner = torch.randint(VOCABULARY, (rows,)), torch.nn.Module()

    def book(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), targets)

    return {
        "reference": book,
        "compile": torch.compile(book, dynamic=False),
        "fastgpt": lambda x, w: ops.linear_cross_entropy(x, w, targets, owner=owner),
    }


def _inputs(rows: int) -> list[Tensor]:
    return [torch.randn(rows, WIDTH), torch.randn(VOCABULARY, WIDTH) * 0.02]


def linear_cross_entropy(rows: int) -> Case:
    forms, inputs = _forms(rows), _inputs(rows)
    exact = forms["reference"](*(t.double() for t in inputs))
    return Case({name: partial(form, *inputs) for name, form in forms.items()}, exact)


def linear_cross_entropy_backward(rows: int) -> Case:
    return both_ways(_forms(rows), _inputs(rows))


CASES = {
    f"{build.__name__} [{rows}, {WIDTH}]": partial(build, rows)
    for build in (linear_cross_entropy, linear_cross_entropy_backward)
    for rows in ROWS
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", CASES)
def test_linear_cross_entropy(measure, name, peer):
    measure(name, CASES[name], peer)
