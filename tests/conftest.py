"""Uninitialised memory is filled with NaN, so that an element which a kernel never writes shows.

Calls take as many threads as a test asks for, also more than there are processors.
"""

import pytest
import torch
from helpers import FUSED, PAIRS, PATHS, use_path

import fastgpt
from fastgpt import cpu

if cpu.missing is None:
    cpu._C.limit_threads(1 << 30, within_affinity=False)


@pytest.fixture(autouse=True)
def _nan_in_empty():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=PATHS)
def path(request):
    """Runs the test once on every backend and instruction set."""
    with use_path(request.param):
        yield request.param


@pytest.fixture(params=FUSED)
def fused(request):
    """The same on each instruction set alone."""
    with use_path(request.param):
        yield request.param


@pytest.fixture
def float32_products():
    """On the fastest instruction set that doesn't round factors."""
    isas = [isa for isa in fastgpt.cpu.isas() if isa != PAIRS]
    with use_path(f"cpu-{isas[-1]}" if isas else "reference"):
        yield
