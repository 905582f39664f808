"""The products of a layer, [rows, 768] by [3072, 768], from one row to a long prompt; and backward,
with the gradients of the rows and of the weight.
"""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fastgpt import ops
from fastgpt.bench.case import Case, both_ways

N_IN, N_OUT = 768, 4 * 768
ROWS = (1, 4, 8, 16, 64, 256, 1024)
# The reference is PyTorch's product (MKL's, where torch has it), "torch" its other one, oneDNN's.
PEERS = ("reference", "torch", "compile", "fastgpt")


def linear(rows: int) -> Case:
    x, weight, owner = torch.randn(rows, N_IN), torch.randn(N_OUT, N_IN), torch.nn.Module()
    compiled = torch.compile(F.linear, dynamic=False)
    peers = {
        "reference": lambda: F.linear(x, weight),
        "compile": lambda: compiled(x, weight),
        "fastgpt": lambda: ops.linear(x, weight, owner=owner),
    }
    if torch.backends.mkldnn.is_available():
        peers["torch"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return Case(peers, exact=F.linear(x.double(), weight.double()))


def linear_backward(rows: int) -> Case:
    owner = torch.nn.Module()
    return both_ways(
        {
            "reference": F.linear,
            "compile": torch.compile(F.linear, dynamic=False),
            "fastgpt": lambda x, weight: ops.linear(x, weight, owner=owner),
        },
        [torch.randn(rows, N_IN), torch.randn(N_OUT, N_IN)],
    )


CASES = {
    f"{build.__name__} [{rows}, {N_IN}] x [{N_IN}, {N_OUT}]": partial(build, rows)
    for build in (linear, linear_backward)
    for rows in ROWS
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", CASES)
def test_linear(measure, name, peer):
    measure(name, CASES[name], peer)
