"""The model under PyTorch's tools: compilers, exporters, counters, threads and processes."""

import concurrent.futures
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed.fsdp
from pairs import assert_same, assert_same_model, outputs_and_grads, pair, some_ids
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastgpt

pytestmark = [
    pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning"),
    # PyTorch's and Python's own.
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    if "torch._dynamo" in sys.modules:  # another file's graphs count against the limit
        torch.compiler.reset()
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


COMPILERS = ["eager", "aot_eager"]
if shutil.which("c++") or shutil.which("g++"):
    COMPILERS.append("inductor")


@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_whole(backend):
    ours, book = pair(n_layers=1)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert_same(compiled(some_ids()), book(some_ids()))
    right = outputs_and_grads(book, some_ids())
    mine = outputs_and_grads(compiled, some_ids())
    assert_same({name.removeprefix("_orig_mod."): t for name, t in mine.items()}, right)


def test_compiled_gradients_of_a_transform():
    found, ids = [], some_ids()
    for model in pair(n_layers=1):

        def loss(params, model=model):
            return torch.func.functional_call(model, params, (ids,)).square().mean()

        params = {name: p.detach() for name, p in model.named_parameters()}
        gradients = torch.func.grad(loss)
        found.append(torch.compile(gradients, backend="aot_eager", fullgraph=True)(params))
    assert_same(*found)


def test_compiled_with_dropout_an_edited_mask_and_a_wrapped_layer():
    for change in ("dropout", "mask", "lora"):
        ours, book = pair(n_layers=1)
        for model in (ours, book):
            att = model.trf_blocks[0].att
            if change == "dropout":
                att.dropout.p = 1.0
            elif change == "mask":
                att.mask[:4, :4] = 0
            else:
                att.W_query = nn.Sequential(att.W_query, nn.Tanh())
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert_same(compiled(some_ids()), book(some_ids()))


def test_compiled_for_any_length():
    ours, book = pair(n_layers=1)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for T in (9, 5, 17, 32):
            assert_same(compiled(some_ids(T=T)), book(some_ids(T=T)))


@pytest.mark.parametrize("change", ["data", "training"])
def test_compiled_sees_what_changes_later(change):
    results = []
    for model in pair(n_layers=1, drop_rate=1.0):
        model.eval()
        run = torch.compile(model, backend="aot_eager") if not results else model
        with torch.no_grad():
            run(some_ids())
            if change == "data":
                model.trf_blocks[0].ff.layers[0].weight.data.mul_(2)
            else:
                model.train()
            results.append(run(some_ids()))
    assert_same(*results)


def test_a_block_compiled_in_place():
    ours, book = pair()
    ours(some_ids())
    ours.trf_blocks[0].compile(backend="aot_eager")
    ours.trf_blocks[1].ff.compile(backend="aot_eager")
    assert_same_model(ours, book)
    ours.compile(backend="aot_eager", fullgraph=True)
    assert_same_model(ours, book)


@pytest.mark.parametrize("name", ["", "norm1", "norm2", "att", "ff", "ff.layers", "ff.layers.1"])
def test_a_compiled_part_is_called(name):
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    ours, book = pair(n_layers=1)
    ours.trf_blocks[0].get_submodule(name).compile(backend=compiler)
    ours(some_ids())
    assert_same_model(ours, book)
    assert graphs


def _own_operations(graph):
    return [str(node.target) for node in graph.nodes if "fastgpt" in str(node.target)]


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict, tmp_path):
    """The file holds PyTorch's operations alone: it loads where fastgpt is not imported."""
    ours, book = pair(n_layers=1)
    told_apart = not strict or hasattr(torch.compiler, "is_exporting")
    with fastgpt.use_backend("auto" if told_apart else "reference"):
        program = torch.export.export(
            ours.eval(),
            (some_ids(),),
            dynamic_shapes=({1: torch.export.Dim("length", min=1, max=31)},),
            strict=strict,
        )
    assert _own_operations(program.graph) == []
    if strict:  # else the exporter listens to every module
        assert "scaled_dot_product_attention" in str(program.graph)
    for T in (1, 9, 20):
        assert_same(program.module()(some_ids(T=T)), book(some_ids(T=T)))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save([some_ids(), program.module()(some_ids())], tmp_path / "right.pt")
    code = """
import sys, torch
ids, right = torch.load("right.pt")
assert torch.equal(torch.export.load("model.pt2").module()(ids), right)
assert "fastgpt" not in sys.modules
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_compiled_inside_use_backend_reference():
    """PyTorch's operations alone, in a graph that is not taken outside."""
    found = []

    def compiler(graph, inputs):
        found.append(_own_operations(graph.graph))
        return graph.forward

    ours, book = pair(n_layers=1)
    compiled = torch.compile(ours, backend=compiler, fullgraph=True)
    for name in ("reference", "auto", "reference", "auto"):
        with fastgpt.use_backend(name):
            assert_same(compiled(some_ids()), book(some_ids()))
    inside, outside = found
    assert inside == []
    assert bool(outside) == fastgpt.backends()["cpu"].available


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("gradients", [False, True])
def test_traced(gradients):
    ours, book = pair(n_layers=1)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(ours.eval(), some_ids())  # which checks the trace
        assert_same(traced(some_ids(seed=1)), book(some_ids(seed=1)))


@pytest.mark.parametrize("depth", [None, 4])
def test_flop_counter(depth):
    totals = []
    for model in pair():
        with FlopCounterMode(display=False, **({"depth": depth} if depth else {})) as counter:
            outputs_and_grads(model, some_ids())
        totals.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(some_ids())
        totals[-1] = (totals[-1], counter.get_total_flops())
    assert totals[0] == totals[1]


def test_profiler_that_hooks_every_leaf():
    totals = []
    for model in pair():
        total = 0

        def count(module, inputs, y):
            nonlocal total
            total += sum(p.numel() for p in module.parameters()) * y.shape[1] + y.numel()

        for module in model.modules():
            if not list(module.children()):
                module.register_forward_hook(count)
        model(some_ids())
        totals.append(total)
    assert totals[0] == totals[1]


def test_fake_tensors():
    ours, _ = pair()
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = ours(torch.zeros(2, 9, dtype=torch.long))
    assert logits.shape == (2, 9, 61)
    with FakeTensorMode():
        logits = fastgpt.GPTModel(ours.cfg)(torch.zeros(2, 9, dtype=torch.long))
        logits.sum().backward()
    assert type(logits).__name__ == "FakeTensor"


def test_traced_into_a_graph():
    ours, book = pair(n_layers=1)
    graph = torch.fx.experimental.proxy_tensor.make_fx(ours)(some_ids())
    assert_same(graph(some_ids(seed=1)), book(some_ids(seed=1)))


# Large enough for every kernel to share its work among threads.
WIDE = {"context_length": 256, "emb_dim": 128, "n_heads": 4}


def test_several_threads_at_once(path):
    ours, book = pair(**WIDE)
    batches = [some_ids(T=256, seed=seed) for seed in range(8)]
    with torch.no_grad():
        right = [ours(ids) for ids in batches]
        assert_same(right[0], book(batches[0]))
    start = threading.Barrier(4)

    def work(number):
        start.wait()
        with torch.no_grad(), fastgpt.use_backend(path.partition("-")[0]):
            return [ours(ids) for ids in batches[number:] + batches[:number]]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for number, logits in enumerate(pool.map(work, range(4))):
            expected = right[number:] + right[:number]
            assert all(torch.equal(*both) for both in zip(logits, expected, strict=True))


def test_several_threads_with_gradients():
    ours, book = pair(**WIDE)
    right = outputs_and_grads(book, some_ids(T=200))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for mine in pool.map(lambda _: outputs_and_grads(ours, some_ids(T=200)), range(3)):
            assert_same(mine, right, atol=1e-3)


def in_forked_child(f):
    """Whether f() is true in a forked process; one that hangs is killed, and fails the test."""
    child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(not f()))
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail("the child waits for threads that it doesn't have")
    return child.exitcode == 0


FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes don't fork here")


@FORK
def test_operations_in_a_forked_process(path):
    """On as many threads as before: each splits this work, PyTorch's comparison would not."""
    if path == "reference":
        pytest.skip("PyTorch's own operations hang on several threads in a forked process")
    x, q, one, zero = (
        torch.randn(200, 128),
        torch.randn(1, 4, 100, 64),
        torch.ones(128),
        torch.zeros(128),
    )
    ops = fastgpt.ops

    def results():
        return ops.layer_norm(x, one, zero), ops.bias_gelu(x, zero), ops.causal_attention(q, q, q)

    expected = results()

    def repeats():
        again = results()
        torch.set_num_threads(1)
        return all(torch.equal(*both) for both in zip(again, expected, strict=True))

    assert in_forked_child(repeats)


@FORK
def test_the_model_in_a_forked_process(path):
    """As a DataLoader's worker would run it: PyTorch on one thread."""
    ours, _ = pair(**WIDE)
    ids = some_ids(T=256)
    with torch.no_grad():
        expected = ours(ids)

        def repeats():
            torch.set_num_threads(1)
            return torch.allclose(ours(ids), expected, atol=1e-4)

        assert in_forked_child(repeats)
        assert torch.equal(ours(ids), expected)


@pytest.fixture
def process_group(tmp_path):
    """A group of this one process."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(process_group):
    ours, book = pair()
    wrapped = nn.parallel.DistributedDataParallel(ours)
    for model in (wrapped, book):
        model(some_ids()).square().mean().backward()
    assert_same(*([p.grad for p in model.parameters()] for model in (ours, book)))


@pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "fully_shard"), reason="FSDP2 is public since torch 2.6"
)
def test_fully_sharded(process_group):
    ours, book = pair()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for module in [*ours.trf_blocks, ours]:
        torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    optimisers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (ours, book)]
    for _ in range(2):
        for model, optimiser in zip((ours, book), optimisers, strict=True):
            optimiser.zero_grad()
            model(some_ids()).square().mean().backward()
            optimiser.step()
    with torch.no_grad():
        assert_same(ours(some_ids()), book(some_ids()), atol=1e-3)
