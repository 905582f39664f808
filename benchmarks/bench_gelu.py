"""GELU, and the bias with the GELU that follows it, on the hidden layer's [rows, 3072]."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fastgpt import ops, reference
from fastgpt.bench.case import PEERS, Case, both_ways

WIDTH = 4 * 768
ROWS = (8, 1024, 8192)


def gelu(rows: int) -> Case:
    x = torch.randn(rows, WIDTH)
    compiled = torch.compile(reference.gelu, dynamic=False)
    return Case(
        {
            "reference": lambda: reference.gelu(x),
            "torch": lambda: F.gelu(x, approximate="tanh"),
            "compile": lambda: compiled(x),
            "fastgpt": lambda: ops.gelu(x),
        },
        exact=F.gelu(x.double(), approximate="tanh"),
    )


def bias_gelu(rows: int) -> Case:
    x, bias = torch.randn(rows, WIDTH), torch.randn(WIDTH)

    def book(x, bias):
        return reference.gelu(x + bias)

    compiled = torch.compile(book, dynamic=False)
    return Case(
        {
            "reference": lambda: book(x, bias),
            "torch": lambda: F.gelu(x + bias, approximate="tanh"),
            "compile": lambda: compiled(x, bias),
            "fastgpt": lambda: ops.bias_gelu(x, bias),
        },
        exact=F.gelu(x.double() + bias.double(), approximate="tanh"),
    )


def bias_gelu_backward(rows: int) -> Case:
    def book(x, bias):
        return reference.gelu(x + bias)

    return both_ways(
        {
            "reference": book,
            "torch": lambda x, bias: F.gelu(x + bias, approximate="tanh"),
            "compile": torch.compile(book, dynamic=False),
            "fastgpt": ops.bias_gelu,
        },
        [torch.randn(rows, WIDTH), torch.randn(WIDTH)],
    )


CASES = {
    f"{build.__name__} [{rows}, {WIDTH}]": partial(build, rows)
    for build in (gelu, bias_gelu, bias_gelu_backward)
    for rows in ROWS
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", CASES)
def test_gelu(measure, name, peer):
    measure(name, CASES[name], peer)
