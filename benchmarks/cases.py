"""What the `bench_*.py` files share: the cases of an operation, and the test that times them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from fastgpt.bench.case import OF_AN_OPERATION, Case, Forms, both_ways, forward

Operation = Callable[..., tuple[Forms, list[Tensor]]]  # its forms and inputs at a size
Cases = dict[str, Callable[[], Case]]


def outputs(operation: Operation, sizes: Iterable[Sequence[int]]) -> Cases:
    """The cases of an operation's outputs, by name."""
    name = operation.__name__
    return {f"{name} {list(size)}": partial(_built, forward, operation, size) for size in sizes}


def gradients(operation: Operation, sizes: Iterable[Sequence[int]]) -> Cases:
    """The cases of forward and backward, by name."""
    name = f"{operation.__name__}_backward"
    return {f"{name} {list(size)}": partial(_built, both_ways, operation, size) for size in sizes}


def _built(kind: Callable[..., Case], operation: Operation, size: Sequence[int]) -> Case:
    forms, inputs = operation(*size)
    forms["compile"] = torch.compile(forms["reference"], dynamic=False)
    return kind(forms, inputs)


def benchmark_of(cases: Cases, peers: Sequence[str] = OF_AN_OPERATION) -> Callable[..., None]:
    """The test that times every peer of every case by pytest-benchmark."""

    @pytest.mark.parametrize("peer", peers)
    @pytest.mark.parametrize("name", cases)
    def test(measure, name, peer):
        measure(name, cases[name], peer)

    return test
