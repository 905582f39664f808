import os
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch

import fastgpt
from fastgpt import cpu, dispatch, ops

CPU = fastgpt.backends()["cpu"].available


def test_table():
    table = fastgpt.backends()
    assert list(table) == ["triton", "cpu", "reference"]
    for name, row in table.items():
        assert row.name == name
        assert row.available == (row.reason is None)
        assert row.detail
    assert table["reference"].available


def test_cannot_run_here():
    for name, row in fastgpt.backends().items():
        if not row.available:
            with pytest.raises(fastgpt.BackendError, match=name), fastgpt.use_backend(name):
                pass


def test_unknown_name():
    names = r"'cuda'.*auto, triton, cpu, reference"
    with pytest.raises(ValueError, match=names), fastgpt.use_backend("cuda"):
        pass


def test_nested_and_undone_after_an_error():
    assert dispatch.requested() == (os.environ.get("FASTGPT_BACKEND") or "auto")
    before = dispatch.requested()
    with fastgpt.use_backend("reference"):
        with fastgpt.use_backend("auto"):
            assert dispatch.requested() == "auto"
        assert dispatch.requested() == "reference"
        with pytest.raises(KeyError), fastgpt.use_backend("auto"):
            raise KeyError
        assert dispatch.requested() == "reference"
    assert dispatch.requested() == before


def test_another_thread_keeps_its_own():
    """One that began before: Pythons without a GIL hand a new thread its starter's context."""
    seen, inside = [], threading.Event()

    def look():
        inside.wait()
        seen.append(dispatch.requested())

    thread = threading.Thread(target=look)
    thread.start()
    with fastgpt.use_backend("reference"):
        inside.set()
        thread.join()
    assert seen == [dispatch.requested()]


@pytest.mark.skipif(not CPU, reason=str(fastgpt.backends()["cpu"].reason))
def test_choice():
    x = torch.ones(2, 3)
    assert dispatch.choose("op", x) == "cpu"
    assert dispatch.choose("op", x.to("meta")) == "reference"
    with fastgpt.use_backend("reference"):
        assert dispatch.choose("op", x) == "reference"
    with fastgpt.use_backend("cpu"):
        assert dispatch.choose("op", x) == "cpu"
        with pytest.raises(fastgpt.BackendError, match=r"'cpu' cannot run op: .*float32.*float64"):
            dispatch.choose("op", x.double())
        with pytest.raises(fastgpt.BackendError, match="meta"):
            dispatch.choose("op", x.to("meta"))


@pytest.mark.skipif(not CPU, reason=str(fastgpt.backends()["cpu"].reason))
def test_falling_back_is_said_once(recwarn):
    dispatch._say.cache_clear()
    for _ in range(3):
        ops.gelu(torch.ones(3, dtype=torch.float64))
    assert [w.category for w in recwarn] == [fastgpt.BackendWarning]
    assert "float64" in str(recwarn[0].message)


def test_threads_that_find_the_same_say_it_once(monkeypatch):
    dispatch._say.cache_clear()
    said, together = [], threading.Barrier(4)

    def warn(message, *args, **kwargs):
        said.append(message)
        time.sleep(0.1)  # as the one who hears it may

    def find():
        together.wait()
        dispatch._say_once("cpu", "of the weather")

    monkeypatch.setattr(warnings, "warn", warn)
    threads = [threading.Thread(target=find) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 1
    dispatch._say.cache_clear()


def _run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


GELU = "import torch, fastgpt; print(fastgpt.dispatch.choose('gelu', torch.ones(3)))"


@pytest.mark.skipif(not CPU, reason=str(fastgpt.backends()["cpu"].reason))
def test_auto_passes_over_what_is_slower(monkeypatch, recwarn, capsys):
    x, w = torch.randn(3, 8), torch.randn(4, 8)
    model = fastgpt.GPTModel(fastgpt.GPT_CONFIG_124M | {"emb_dim": 32, "n_heads": 2, "n_layers": 1})
    monkeypatch.setattr(cpu, "passed_over", "it is slow here")
    assert dispatch.choose("linear", x, w) == "reference"
    assert not dispatch.runs_whole(x)
    assert not dispatch.traceable("gelu", x)
    assert dispatch.choose("quantized_linear", x) == "cpu"
    assert fastgpt.backends()["cpu"].available
    assert "auto passes it over: it is slow here" in fastgpt.backends()["cpu"].detail
    fastgpt.explain(model)
    assert "backend reference (it is slow here)" in capsys.readouterr().out
    with fastgpt.use_backend("cpu"):
        assert dispatch.choose("linear", x, w) == "cpu"
        assert dispatch.runs_whole(x)
        assert dispatch.traceable("gelu", x)
    with cpu.use_isa(cpu.isas()[0]):
        assert dispatch.choose("linear", x, w) == "cpu"
    assert dispatch.choose("linear", x, w) == "reference"
    assert not recwarn.list


@pytest.mark.skipif(not CPU, reason=str(fastgpt.backends()["cpu"].reason))
@pytest.mark.parametrize(
    ("platform", "isa", "reason"),
    [
        ("linux", "baseline", "baseline build is slower"),
        ("linux", None, None),
        ("darwin", None, "not been timed on a Mac"),
        ("win32", None, "not been timed on Windows"),
    ],
)
def test_what_auto_passes_over(monkeypatch, platform, isa, reason):
    if isa not in (None, *cpu.isas()) or cpu.isas() == ["baseline"]:
        pytest.skip(f"runs where there are a baseline build and another, here {cpu.isas()}")
    monkeypatch.setattr(sys, "platform", platform)
    with cpu.use_isa(isa or cpu.isas()[-1]):
        found = cpu._slower()
    assert found is None if reason is None else reason in found


def test_environment():
    assert _run(GELU, FASTGPT_BACKEND="reference").stdout.strip() == "reference"
    assert _run(GELU, FASTGPT_BACKEND="").stdout.strip() == ("cpu" if CPU else "reference")
    run = _run(GELU, FASTGPT_BACKEND="gpu")
    assert "FASTGPT_BACKEND: unknown backend 'gpu'" in run.stderr
    run = _run(GELU, FASTGPT_BACKEND="triton")
    assert "BackendError: backend 'triton' cannot run here" in run.stderr
    within = GELU.replace("print(", "\nwith fastgpt.use_backend('reference'): print(")
    assert _run(within, FASTGPT_BACKEND="triton").stdout.strip() == "reference"


def test_without_the_extension_everything_runs_and_says_so_once():
    code = """
import sys
sys.modules["fastgpt._C"] = None
import torch, fastgpt
print(fastgpt.backends()["cpu"].reason)
x = torch.ones(3, 4)
print(fastgpt.ops.gelu(x).shape, fastgpt.ops.gelu(x).shape)
"""
    run = _run(code)
    assert run.returncode == 0, run.stderr
    assert "extension is missing" in run.stdout
    assert run.stderr.count("BackendWarning") == 1


def test_asking_for_one_backend_looks_at_no_other(monkeypatch):
    """To look at Triton sets a GPU up, which a process that means to fork must not."""
    looked = dispatch._KERNELS["triton"]._replace(reason=lambda index: pytest.fail("looked at"))
    monkeypatch.setitem(dispatch._KERNELS, "triton", looked)
    with fastgpt.use_backend("reference"):
        pass
    if CPU:
        with fastgpt.use_backend("cpu"):
            ops.gelu(torch.ones(3))


ELSEWHERE = """
import importlib.util, sys, torch
sys.platform = {platform!r}
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: {spec} if name == "triton" else found(name, *rest)
from fastgpt.triton import missing_reason
print(missing_reason())
"""


@pytest.mark.parametrize(
    ("platform", "spec", "reason"),
    [
        ("win32", "True", "None"),
        ("win32", "None", "triton is not installed (pip install triton-windows)"),
        ("linux", "None", "triton is not installed (pip install triton)"),
        ("darwin", "None", "triton is not installed (there is none for darwin)"),
    ],
)
def test_triton_is_looked_for_on_every_platform(platform, spec, reason):
    run = _run(ELSEWHERE.format(platform=platform, spec=spec))
    assert run.stdout.strip() == reason, run.stderr


@pytest.mark.parametrize("name", ["triton", "torch._dynamo", "torch._inductor"])
def test_importing_does_not_import(name):
    run = _run(f"""
import sys, torch, torch.utils._python_dispatch
before = set(sys.modules)  # torch 2.5 imports Inductor's configuration by itself
import fastgpt
print({name!r} in set(sys.modules) - before)
""")
    assert run.stdout.strip() == "False", run.stderr


def test_a_sparse_tensor_is_pytorchs():
    x = torch.eye(4)
    y, total = fastgpt.ops.add_layer_norm(x, x.to_sparse(), x[0], x[1])
    right, _ = fastgpt.ops.add_layer_norm(x, x, x[0], x[1])
    assert torch.equal(total, 2 * x)
    torch.testing.assert_close(y, right)
