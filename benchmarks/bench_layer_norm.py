"""Layer norm, and the residual sum with the norm that follows it, on [rows, 768]."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fastgpt import ops, reference
from fastgpt.bench.case import PEERS, Case, both_ways

WIDTH = 768
ROWS = (8, 1024, 8192)


def layer_norm(rows: int) -> Case:
    x, weight, bias = torch.randn(rows, WIDTH), torch.randn(WIDTH), torch.randn(WIDTH)
    compiled = torch.compile(reference.layer_norm, dynamic=False)
    return Case(
        {
            "reference": lambda: reference.layer_norm(x, weight, bias),
            "torch": lambda: F.layer_norm(x, (WIDTH,), weight, bias),
            "compile": lambda: compiled(x, weight, bias),
            "fastgpt": lambda: ops.layer_norm(x, weight, bias),
        },
        exact=reference.layer_norm(x.double(), weight.double(), bias.double()),
    )


def add_layer_norm(rows: int) -> Case:
    x, branch = torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)
    weight, bias = torch.randn(WIDTH), torch.randn(WIDTH)

    def book(x, branch, weight, bias):
        total = branch + x
        return reference.layer_norm(total, weight, bias), total

    def torch_form():
        total = branch + x
        return F.layer_norm(total, (WIDTH,), weight, bias), total

    compiled = torch.compile(book, dynamic=False)
    return Case(
        {
            "reference": lambda: book(x, branch, weight, bias),
            "torch": torch_form,
            "compile": lambda: compiled(x, branch, weight, bias),
            "fastgpt": lambda: ops.add_layer_norm(x, branch, weight, bias),
        },
        exact=book(x.double(), branch.double(), weight.double(), bias.double()),
    )


def layer_norm_backward(rows: int) -> Case:
    return both_ways(
        {
            "reference": reference.layer_norm,
            "torch": lambda x, weight, bias: F.layer_norm(x, (WIDTH,), weight, bias),
            "compile": torch.compile(reference.layer_norm, dynamic=False),
            "fastgpt": ops.layer_norm,
        },
        [torch.randn(rows, WIDTH), torch.randn(WIDTH), torch.randn(WIDTH)],
    )


CASES = {
    f"{build.__name__} [{rows}, {WIDTH}]": partial(build, rows)
    for build in (layer_norm, add_layer_norm, layer_norm_backward)
    for rows in ROWS
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", CASES)
def test_layer_norm(measure, name, peer):
    measure(name, CASES[name], peer)
