"""The bound: what the machine can do at most, and the operations that are counted."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastgpt import GPT_CONFIG_124M, GPTModel, cpu, reference
from fastgpt.bench import bound
from fastgpt.bench.workloads import FULL, QUICK, Work
from fastgpt.cpu import peak
from fastgpt.training import report, speed
from fastgpt.training.trainer import Step

SMALL = GPT_CONFIG_124M | {"vocab_size": 97, "context_length": 32, "emb_dim": 16, "n_heads": 2}
SMALL |= {"n_layers": 3, "drop_rate": 0.0}
PEAKS = {"flops": 1e9, "bandwidth": 1e8}

needs_extension = pytest.mark.skipif(cpu.isa() is None, reason="no C++ extension")


@pytest.fixture
def peaks(monkeypatch):
    monkeypatch.setattr(bound, "machine_peaks", lambda dtype=torch.float32: PEAKS)


def attention_above_the_diagonal(tokens):
    """The operations that PyTorch does on scores which the causal mask throws away."""
    return 2 * 2 * SMALL["n_layers"] * SMALL["emb_dim"] * tokens * (tokens - 1) / 2


@pytest.mark.parametrize("backward", [False, True])
def test_operations_are_those_that_torch_counts(backward):
    model, times = reference.GPTModel(SMALL), 3 if backward else 1
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.randint(97, (1, 20)))
        if backward:
            logits.sum().backward()
    counted = counter.get_total_flops() - times * attention_above_the_diagonal(20)
    assert times * bound.forward_flops(SMALL, 20) == counted
    if backward:
        assert speed.flops_per_token(GPTModel(SMALL), 20) == counted / 20


def test_operations_token_by_token_are_those_of_one_pass():
    one_by_one = sum(bound.forward_flops(SMALL, 1, past) for past in range(20))
    assert one_by_one == bound.forward_flops(SMALL, 20)
    head = 2 * SMALL["vocab_size"] * SMALL["emb_dim"]
    last_only = bound.forward_flops(SMALL, 20, head_rows=1)
    assert bound.forward_flops(SMALL, 20) - last_only == 19 * head


def test_weights_are_those_of_the_linear_layers():
    modules = reference.GPTModel(SMALL).modules()
    weights = [m.weight for m in modules if isinstance(m, torch.nn.Linear)]
    assert bound.weight_bytes(SMALL) == sum(w.nbytes for w in weights)


@pytest.mark.usefixtures("peaks")
def test_a_bound_is_operations_or_memory_whichever_takes_longer():
    assert bound.bound_seconds(5e9, 1) == 5.0
    assert bound.bound_seconds(1, 3e8) == 3.0


@pytest.mark.usefixtures("peaks")
def test_the_bound_of_each_kind_of_work():
    toy = Work("forward", "toy", 1, 8).cfg
    forward, train = (Work(kind, "toy", 64, 64).bound for kind in ("forward", "train"))
    assert forward == 64 * bound.forward_flops(toy, 64) / PEAKS["flops"]
    assert train == 3 * forward
    one_read = bound.weight_bytes(toy) / PEAKS["bandwidth"]
    assert Work("forward", "toy", 1, 1).bound == one_read
    assert Work("decode", "toy", 1, 1, 5).bound == 5 * one_read
    loop = Work("decode", "toy", 1, 1, 5, uncached=True)
    assert loop.bound == 5 * one_read
    assert Work("lookup", "toy in loops", 1, 1, 5).bound is None


@pytest.mark.usefixtures("peaks")
def test_the_bound_of_different_lengths_reads_the_weights_for_all_at_once():
    toy = Work("forward", "toy", 1, 8).cfg
    one_read = bound.weight_bytes(toy) / PEAKS["bandwidth"]
    few = Work("batch", "toy", 3, 5, 7, shortest=2, fewest=3)
    assert len(set(few.counts)) > 1
    assert few.bound == pytest.approx(max(few.counts) * one_read)
    many = Work("batch", "toy", 500, 5, 7, shortest=2, fewest=3)
    operations = sum(  # the last token that is generated is not fed
        bound.forward_flops(toy, len(text) + count - 1, head_rows=count)
        for text, count in zip(many.texts, many.counts, strict=True)
    )
    assert many.bound == pytest.approx(operations / PEAKS["flops"])
    scores = Work("score", "toy", 500, 9, shortest=2)
    fed = sum(bound.forward_flops(toy, len(text) - 1) for text in scores.texts)
    assert scores.bound == pytest.approx(fed / PEAKS["flops"])


def test_no_extension_no_bound(monkeypatch):
    monkeypatch.setattr(cpu, "isa", lambda: None)
    assert bound.machine_peaks() is None
    assert bound.bound_seconds(1.0, 1.0) is None
    assert {work.bound for work in (*FULL, *QUICK)} == {None}
    assert math.isnan(speed.peak(torch.device("cpu"), torch.autocast("cpu", enabled=False)))


def test_a_step_is_held_against_the_peak_of_its_dtype(monkeypatch):
    monkeypatch.setattr(speed, "peak_flops", {torch.float32: 7.0}.get)
    device = torch.device("cpu")
    assert speed.peak(device, torch.autocast("cpu", enabled=False)) == 7.0
    assert math.isnan(speed.peak(device, torch.autocast("cpu", torch.bfloat16)))
    assert speed.peak_is(device) == "fused multiply-adds"
    assert "PyTorch" in speed.peak_is(torch.device("cuda"))
    row = Step(1, 50, 2.5, 1e-3, 0.5, 1e3, None, 0, None)
    assert "- of peak" in report._line(row, 1.0)


@needs_extension
def test_a_dtype_that_no_kernel_measures_has_no_bound():
    assert bound.machine_peaks(torch.float64) is None
    assert bound.bound_seconds(1.0, 1.0, torch.float64) is None


def test_the_best_stretch_of_each_thread_counts():
    window = bound.WINDOW
    steady = torch.arange(3 * window) * 0.5  # two pieces a second
    # Half as fast, but for one stretch, and away for a hundred seconds.
    slow = torch.arange(1.0 * window)
    other = torch.cat([slow, slow[-1] + 100 + torch.arange(window + 1) * 0.25])
    pairs = [torch.stack([t.double(), torch.full_like(t, i).double()], 1)
             for i, t in enumerate((steady, other))]  # fmt: skip
    ends = torch.cat(pairs)
    assert bound._best_rate(ends) == pytest.approx(2 + 4)
    few = torch.stack([torch.arange(5.0).double(), torch.full((5,), 7.0).double()], 1)
    assert bound._best_rate(torch.cat([ends, few])) == pytest.approx(2 + 4)


@needs_extension
@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("threads", [1, 3])
def test_every_piece_is_done_once_and_noted(isa, threads):
    with cpu.use_isa(isa):
        ends = bound._ends(50).fill_(torch.nan)
        operations = peak.multiply_adds(ends, threads)
        assert operations > 0
        check_noted(ends, threads)
        block = torch.full((4 * 256,), torch.nan)  # nothing is asked of what is read
        ends = bound._ends(9).fill_(torch.nan)
        peak.read(block, 256, ends, threads)
        check_noted(ends, threads)


def check_noted(ends, threads):
    assert not ends.isnan().any()
    assert (ends[:, 1] >= 0).all()
    assert (ends[:, 1] < threads).all()
    for thread in ends[:, 1].unique():
        assert (ends[ends[:, 1] == thread, 0].diff() >= 0).all()


@needs_extension
def test_peaks_are_measured_once_for_each_number_of_threads_and_instruction_set(monkeypatch):
    calls = []
    monkeypatch.setattr(bound, "_best_rate", lambda ends: calls.append(len(ends)) or 1.0)
    monkeypatch.setattr(bound, "LEAST_BLOCK", 1 << 20)
    monkeypatch.setattr(bound, "_last_level_cache", lambda: 0)
    bound._flops.cache_clear()
    bound._bandwidth.cache_clear()
    threads = torch.get_num_threads()
    try:
        first = bound.machine_peaks()
        assert bound.machine_peaks() == first
        assert len(calls) == 2
        assert first["bandwidth"] == 4 * bound.PIECE
        torch.set_num_threads(threads + 1)
        bound.machine_peaks()
        assert len(calls) == 4
        with cpu.use_isa(cpu.isas()[0]):
            bound.machine_peaks()
        assert len(calls) == (4 if len(cpu.isas()) == 1 else 6)
        bound.peak_flops()
    finally:
        torch.set_num_threads(threads)
        bound._flops.cache_clear()
        bound._bandwidth.cache_clear()
