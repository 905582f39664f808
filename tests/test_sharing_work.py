"""How the C++ kernels share work: the same bits whichever thread does what, and nobody waits for
one that does not run.
"""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fastgpt
from fastgpt import GPT_CONFIG_124M, GPTModel, ops, use_backend

CPU = fastgpt.backends()["cpu"]
pytestmark = pytest.mark.skipif(not CPU.available, reason=str(CPU.reason))
THREADS = (1, 2, 3, 7, 16)
CFG = GPT_CONFIG_124M | {
    "vocab_size": 500,
    "context_length": 200,
    "emb_dim": 96,
    "n_heads": 3,
    "n_layers": 2,
    "qkv_bias": True,
}


@pytest.fixture(autouse=True)
def _on_cpu():
    before = torch.get_num_threads()
    with use_backend("cpu"):
        yield
    torch.set_num_threads(before)


def results(run):
    """What `run` gives with each number of threads, a list of tensors."""
    made = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        made.append(run())
    return made


def same_bits(made):
    first, *others = made
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 150)])
def test_forward(shape, dtype):
    model, ids = GPTModel(CFG).eval().to(dtype), torch.randint(500, shape)
    with torch.no_grad():
        same_bits(results(lambda: [model(ids)]))


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int4"])
def test_quantised(precision):
    model = fastgpt.quantize(GPTModel(CFG).eval(), precision)
    with torch.no_grad():
        for shape in ((1, 1), (3, 150)):
            ids = torch.randint(500, shape)
            same_bits(results(lambda ids=ids: [model(ids)]))


@pytest.mark.parametrize("autocast", [False, True])
def test_training_step(autocast):
    """With dropout, and with too few heads for a share of the keys each."""
    model, ids = GPTModel(CFG), torch.randint(500, (1, 190))

    def step():
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model.loss(ids, ids.roll(-1, 1))
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    same_bits(results(step))


def test_operations():
    x, w, b = torch.randn(300, 96), torch.randn(130, 96), torch.randn(130)
    q, k, v = torch.randn(3, 2, 3, 180, 32)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, w, b, q, k, v)]
        x_, w_, b_, *qkv = leaves
        y = ops.layer_norm(ops.linear(x_, w_, b_), b_, b_, 1e-5)
        a = ops.causal_attention(*qkv)
        loss = ops.linear_cross_entropy(x_, w_, torch.arange(300) % 130)
        (y.square().sum() + a.square().sum() + loss.sum()).backward()
        return [y.detach(), a.detach(), loss.detach(), *(t.grad for t in leaves)]

    same_bits(results(run))


def test_more_threads_than_processors_from_several_python_threads():
    model, ids = GPTModel(CFG).eval(), torch.randint(500, (2, 40))
    torch.set_num_threads(2 * (os.cpu_count() or 1) + 1)
    with torch.no_grad():
        expected, wrong = model(ids), []

        def work():
            with torch.no_grad(), use_backend("cpu"):
                for _ in range(40):
                    if not torch.equal(model(ids), expected):
                        wrong.append(1)

        others = [threading.Thread(target=work) for _ in range(3)]
        for thread in others:
            thread.start()
        for thread in others:
            thread.join()
    assert not wrong


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_no_race(tmp_path):
    here, program = Path(__file__).parent, tmp_path / "shared_work"
    command = ["g++", "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread"]
    command += [f"-I{here.parent / 'csrc'}", here / "shared_work.cpp", "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr and "tsan" in built.stderr:
        pytest.skip("ThreadSanitizer's library is not installed")
    assert built.returncode == 0, built.stderr
    for threads in ("2", "3", "8"):
        run = subprocess.run([program, threads, "20"], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_small_calls_take_one_thread_where_several_wait_and_are_slower(tmp_path):
    here, program = Path(__file__).parent, tmp_path / "pace"
    command = ["g++", "-std=c++17", f"-I{here.parent / 'csrc'}", here / "pace.cpp", "-o", program]
    subprocess.run(command, check=True)

    def threads(several, one, waited):
        given = [program, *map(str, (several, one, waited)), "400"]
        said = subprocess.run(given, capture_output=True, text=True, check=True).stdout.split()
        return said.count("4"), said.count("1")

    assert threads(5, 8, 0.05) == (400, 0)
    several, one = threads(5, 8, 0.5)  # it tries, and finds several faster
    assert 0 < one < 0.03 * several
    several, one = threads(5, 80, 0.5)  # .. at once
    assert one == 1
    several, one = threads(9, 8, 0.5)
    assert 0 < several < 0.07 * one


def test_gelu_of_one_long_row():
    """A long row is shared out by stretches of it."""
    x = torch.randn(1, 300_000)
    same_bits(results(lambda: [ops.gelu(x)]))
    assert torch.allclose(ops.gelu(x), F.gelu(x, approximate="tanh"), atol=1e-5)
