"""Kernels are compiled side by side before a graph of them is captured, and a line says so once."""

import logging
import threading

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from fastgpt.triton import compilation
from fastgpt.triton.gelu import bias_gelu
from fastgpt.triton.layer_norm import layer_norm
from fastgpt.triton.linear import linear
from fastgpt.triton.probe import write_one
from on_triton.support import gpu

LAUNCHERS = layer_norm, bias_gelu, linear


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The kernels compiled from now on, each with the thread that did it; none is on the disk."""
    found = []

    def listen(*, src, **more):
        found.append((src.fn.__name__, threading.get_ident()))

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(knobs.compilation, "listener", listen)
    with gpu.fake_gpu("sm_80") as launches:
        for kernel in kernels_of(*LAUNCHERS):
            monkeypatch.setattr(kernel, "device_caches", kernel.device_caches.copy())
            kernel.device_caches.clear()
        yield found, launches


def kernels_of(*launchers):
    """The kernels in the launchers' modules."""
    for launcher in launchers:
        for name, value in launcher.__globals__.items():
            if name.endswith("_kernel"):
                yield value


def _run():
    x, w, ones = torch.empty(64, 96), torch.empty(32, 96), torch.empty(96)
    layer_norm(x, ones, ones, 1e-5, y := torch.empty_like(x))
    bias_gelu(y, None, y)
    linear(y, w, None, torch.empty(64, 32))


side_by_side = pytest.mark.skipif(
    not compilation.SIDE_BY_SIDE, reason="takes triton 3.8 and Python 3.13"
)


@side_by_side
def test_side_by_side_and_before_the_launch(compiled):
    found, launches = compiled
    compilation.compile_ahead(_run)
    assert {name for name, _ in found} == {
        "layer_norm_fwd_kernel",
        "bias_gelu_fwd_kernel",
        "linear_kernel",
    }
    assert threading.get_ident() not in {thread for _, thread in found}
    assert launches == []
    before = len(found)
    _run()
    assert len(launches) == 3
    assert len(found) == before


@side_by_side
def test_an_error_in_between_ends_it(compiled):
    found, launches = compiled

    def fails():
        raise LookupError("no such layer")

    with pytest.raises(LookupError, match="no such layer"):
        compilation.compile_ahead(fails)
    _run()
    assert len(launches) == len(found) == 3


@side_by_side
def test_what_cannot_be_compiled_is_raised_by_the_launch(compiled, monkeypatch):
    _, launches = compiled

    def fails(*, src, **more):
        if src.fn.__name__ == "bias_gelu_fwd_kernel":
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(knobs.compilation, "listener", fails)
    compilation.compile_ahead(_run)

    def launch():
        _run()
        return [launch.compiled.asm for launch in launches]  # read by a launch on a GPU

    with pytest.raises(RuntimeError, match="no such instruction"):
        launch()


def test_nothing_runs_where_it_cannot_be_done(monkeypatch):
    monkeypatch.setattr(compilation, "SIDE_BY_SIDE", False)
    compilation.compile_ahead(lambda: pytest.fail("it ran"))


def test_one_line_says_that_kernels_are_compiled(compiled, caplog):
    heard, _ = compiled
    compilation.announce.__wrapped__()
    _run()
    assert len(heard) == 3  # who listened before still does
    (line,) = caplog.records
    assert (line.name, line.levelno) == ("fastgpt", logging.WARNING)
    assert "compiles its Triton kernels for this GPU, each when it is first needed" in line.message
    assert knobs.cache.dir in line.message


def test_kernels_that_lie_on_the_disk_are_not_spoken_of(compiled, caplog):
    _run()
    for kernel in kernels_of(*LAUNCHERS):
        kernel.device_caches.clear()
    compilation.announce.__wrapped__()
    heard, _ = compiled
    _run()
    assert len(heard) == 6
    assert caplog.records == []


def test_the_probe_warns_of_nothing(compiled):
    write_one(torch.empty(1, dtype=torch.int32))
    (launch,) = compiled[1]
    assert launch.arguments["enable_fp_fusion"]


@triton.jit
def anothers_kernel(x_ptr):
    tl.store(x_ptr, 1)


def test_nor_are_those_of_others(compiled, caplog):
    compilation.announce.__wrapped__()
    anothers_kernel[(1,)](torch.empty(1, dtype=torch.int32), enable_fp_fusion=True)
    assert caplog.records == []
