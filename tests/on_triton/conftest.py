"""The Triton kernels without a GPU: interpreted on CPU tensors, or compiled for a GPU that is not
there. Where triton is not installed, or is too old, every file here is skipped.

The folder is not called triton because tests/ is on the import path, where a folder of that name
would pass for the package.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import dispatch
from fastgpt.triton import missing_reason, too_old

_FOLDER = Path(__file__).parent
# Compiled kernels are kept between runs; triton's own default is in the home directory.
os.environ.setdefault("TRITON_CACHE_DIR", str(_FOLDER.parents[1] / "build" / "triton-cache"))


_REASON = missing_reason() or too_old()


class _Skipped(pytest.Module):
    def collect(self):
        pytest.skip(_REASON, allow_module_level=True)


if _REASON is not None:

    def pytest_pycollect_makemodule(module_path, parent):
        return _Skipped.from_parent(parent, path=module_path)


def _is_compiled(item):
    return item.path == _FOLDER / "test_compiled.py"


def pytest_collection_modifyitems(items):
    """The compiled cases come last in the folder: a second process compiles during the others."""
    ours = [i for i, item in enumerate(items) if item.path.parent == _FOLDER]
    ordered = sorted((items[i] for i in ours), key=_is_compiled)
    for i, item in zip(ours, ordered, strict=True):
        items[i] = item


@pytest.fixture(scope="package", autouse=True)
def _ahead(request):
    """Where more than a few cases are to be compiled, a second process starts with them at once,
    unless the tests are several processes' anyway.
    """
    few = sum(map(_is_compiled, request.session.items)) <= 20
    if few or "PYTEST_XDIST_WORKER" in os.environ:
        yield
        return
    from on_triton.support.ahead import compiling_ahead

    with compiling_ahead():
        yield


def pytest_terminal_summary(terminalreporter):
    """How many cases were compiled, which kernels spill, and what all of them take at most."""
    compiled = sys.modules.get("on_triton.test_compiled")
    if compiled is None or not compiled.taken:
        return
    line = terminalreporter.line
    terminalreporter.section("compiled ahead of time")
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    ran = sum("test_compiled.py" in report.nodeid for report in reports)
    whole = len(compiled.cases(whole=True))
    line(f"{ran} of {whole} cases" + ("" if compiled.ALL else "; `make archs` compiles all"))
    for arch, kernels in compiled.taken.items():
        spilled = {f"{k.name} ({k.mode})" for k in kernels.values() if k.spilled}
        if spilled:
            line(f"{arch} spills registers in {', '.join(sorted(spilled))}")
    if not compiled.ALL:
        return
    line("| architecture | kernels | most registers a thread | most shared memory a program |")
    line("|---|---|---|---|")
    for arch, kernels in compiled.taken.items():
        most = max(kernels.values(), key=lambda kernel: kernel.registers)
        registers = f"{most.registers}: {most.name}, {most.mode}"
        most = max(kernels.values(), key=lambda kernel: kernel.shared)
        shared = f"{most.shared / 1024:.0f} KiB: {most.name}, {most.mode}"
        line(f"| {arch} | {len(kernels)} | {registers} | {shared} |")


@pytest.fixture
def interpreted():
    from on_triton.support.interpreter import interpreted

    with interpreted():
        yield


@pytest.fixture
def dispatched(interpreted, monkeypatch):
    """fastgpt.ops on interpreted kernels, for CPU tensors."""
    row = dispatch._KERNELS["triton"]._replace(device="cpu", reason=lambda index: None)
    monkeypatch.setitem(dispatch._KERNELS, "triton", row)
    attention = sys.modules["fastgpt.ops.causal_attention"]  # the package has the function there
    # As on a GPU: one number a row.
    monkeypatch.setattr(
        attention, "_statistics", lambda q: q.new_empty(q.shape[:3], dtype=torch.float32)
    )
    with fastgpt.use_backend("triton"):
        yield


@pytest.fixture
def choices():
    """The choices of tokens that were captured, of the fixture `captures`."""
    return []


@pytest.fixture
def captures(monkeypatch, launched_with, choices):
    """The steps that were captured; a replay runs them again into the same memory, and fails where
    a parameter lies elsewhere than it did.
    """
    from fastgpt.model import decode_graph
    from fastgpt.triton import vendor

    found = []

    def capture(run):
        with torch.random.fork_rng([]):
            result = run().clone()
        (found if result.is_floating_point() else choices).append(run)
        return lambda: result.copy_(run()), result

    step = decode_graph.step

    def step_as_captured(parts, state):
        assert vars(state).setdefault("captured", parts.key()) == parts.key()
        return step(parts, state)

    monkeypatch.setattr(decode_graph, "capture", capture)
    monkeypatch.setattr(decode_graph, "step", step_as_captured)
    monkeypatch.setattr(decode_graph, "MIN_STEPS", 2)
    # Interpreting takes time for each program: few of them, and the vendor's products where a step
    # is not in fused launches.
    for kernel in ("linear_rows", "linear_columns"):
        launched_with(kernel, BLOCK_N=256, BLOCK_K=256)
    monkeypatch.setattr(vendor, "own_product", lambda *args, **kwargs: False)
    return found


@pytest.fixture
def launched_with(monkeypatch):
    """launched_with(kernel, BLOCK=...): other settings for a kernel, so that small inputs cross its
    tiles' borders.
    """
    from fastgpt.triton import launch_table

    def use(kernel, num_warps=4, num_stages=1, **blocks):
        row = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **blocks}
        monkeypatch.setitem(launch_table.TABLE, kernel, {(launch_table.ANY,) * 3: row})
        launch_table.lookup.cache_clear()

    yield use
    monkeypatch.undo()
    launch_table.lookup.cache_clear()


@pytest.fixture
def padded():
    """Puts tensors into buffers of NaN; see support/padding.py."""
    from on_triton.support.padding import Padding

    padding = Padding()
    yield padding
    padding.check()
