"""A forward pass of the whole model, token ids to logits: GPT-2 124M and a toy of two layers."""

import pytest

from fastgpt.bench.case import ALL_PEERS
from fastgpt.bench.workloads import Work

SHAPES = (
    ("GPT-2 124M", 2, 4),
    ("GPT-2 124M", 8, 8),
    ("GPT-2 124M", 8, 128),
    ("GPT-2 124M", 1, 1024),
    ("toy", 4, 64),
)
WORKS = [Work("forward", *shape) for shape in SHAPES]
CASES = {work.name: work.case for work in WORKS}


@pytest.mark.parametrize("peer", [p for p in ALL_PEERS if p not in ("ct2", "cached", "loss")])
@pytest.mark.parametrize("name", CASES)
def test_forward(measure, name, peer):
    measure(name, CASES[name], peer)
