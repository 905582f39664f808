"""Numerical derivatives in float64: of the reference, and of every operation's own form there."""

import pytest
import torch
from pairs import CONFIG, pair
from torch.autograd import gradcheck

from fastgpt import ops, reference

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


MASK = torch.ones(5, 5, dtype=torch.bool).triu(1)
IDS = torch.tensor([[1, 0, 2], [2, 2, 1]])
TARGETS = torch.tensor([0, 6, -100, 3])
OPERATIONS = {
    "reference.layer_norm": (reference.layer_norm, [(3, 8), (8,), (8,)]),
    "reference.gelu": (reference.gelu, [(3, 8)]),
    "reference.causal_attention": (
        lambda q, k, v: reference.causal_attention(q, k, v, MASK),
        [(1, 2, 5, 4)] * 3,
    ),
    "layer_norm": (ops.layer_norm, [(3, 8), (8,), (8,)]),
    "add_layer_norm": (ops.add_layer_norm, [(3, 8), (3, 8), (8,), (8,)]),
    "gelu": (ops.gelu, [(3, 8)]),
    "bias_gelu": (ops.bias_gelu, [(3, 8), (8,)]),
    "causal_attention": (ops.causal_attention, [(1, 2, 5, 4)] * 3),
    "embedding": (lambda tok, pos: ops.embedding(IDS, tok, pos), [(3, 4), (5, 4)]),
    "linear": (ops.linear, [(3, 6), (5, 6), (5,)]),
    "linear_cross_entropy": (
        lambda x, w: ops.linear_cross_entropy(x, w, TARGETS),
        [(4, 6), (7, 6)],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    f, shapes = OPERATIONS[name]
    assert gradcheck(f, [double(*shape) for shape in shapes])


@pytest.mark.parametrize("which", [0, 1], ids=["fastgpt", "reference"])
def test_a_whole_block(which):
    block = pair({**CONFIG, "emb_dim": 8, "n_heads": 2})[which].trf_blocks[0].double()
    named = dict(block.named_parameters())

    def f(x, *values):
        weights = dict(zip(named, values, strict=True))
        return torch.func.functional_call(block, weights, (x,))

    assert gradcheck(f, [double(1, 3, 8), *named.values()], atol=1e-4)
