"""Every table that is keyed by the architecture has a row or a stated default for each of them."""

import itertools
from pathlib import Path

import pytest
import torch

from fastgpt import triton
from fastgpt.triton import launch_table, vendor
from fastgpt.triton.linear import _TMA_ARCHS
from on_triton.support.gpu import ARCHS

DOCS = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()
SHAPES = list(itertools.product([2, 4], [(1024, 1024), (7, 7), (1, 7)], *[[True, False]] * 2))


@pytest.mark.parametrize("arch", ["sm_75", *ARCHS])
def test_an_architecture_is_in_every_table(monkeypatch, arch):
    assert arch in DOCS.split("| architecture |")[1].split("\n\n")[0]
    if arch.startswith("sm_"):
        capability = int(arch[3:-1]), int(arch[-1])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        assert triton.too_old_gpu(0) == (arch not in ARCHS)
    if arch not in ARCHS:  # no kernel is launched there, and no table asked
        return
    shares = launch_table.class_of(arch)
    assert ARCHS[shares].shared == ARCHS[arch].shared
    for kernel, rows in launch_table.TABLE.items():
        if kernel == "linear_tma" and arch not in _TMA_ARCHS:  # "linear" runs
            assert not any(launch_table.class_of(tma) == shares for tma in _TMA_ARCHS)
            continue
        for _, dtype, size in rows:
            for itemsize in {"half": [2], "float": [4]}.get(dtype, [2, 4]):
                assert launch_table.lookup(kernel, arch, itemsize, size) in rows.values()
    for itemsize, sizes, dropout, repeatable in SHAPES:
        found = vendor.attention(arch, itemsize, *sizes, dropout, repeatable)
        assert found in vendor.ATTENTION.values()
        assert found.implementation == "own" or not (repeatable or sizes[0] != sizes[1])
    for itemsize, rows, gelu in itertools.product([2, 4], [1, 16, 17, 65536], [True, False]):
        assert vendor.product(arch, itemsize, rows, gelu) in vendor.PRODUCTS.values()


def test_the_architectures_of_the_tables_are_known():
    """A row under a name that shares another's is never read."""
    tables = [*launch_table.TABLE.values(), vendor.ATTENTION, vendor.PRODUCTS]
    named = {arch for rows in tables for arch, *_ in rows} - {launch_table.ANY}
    assert named <= {launch_table.class_of(arch) for arch in ARCHS}
