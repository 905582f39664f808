"""Many threads on one model and on several, more threads than cores, busy cores, forks: each call
gives the bits that it gives alone, and comes to an end.
"""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastgpt
from fastgpt import cpu
from fastgpt.model.cache import KVCache
from fuzz import tried

pytestmark = pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing))
KINDS = ("float32", "column-major", "bfloat16", "float16", "int8", "int8-dynamic", "int4")
LAYERS, CONTEXT, VOCABULARY = 2, 64, 61
ENOUGH = 120  # seconds, for what takes a few
MANY = 300 if os.environ.get("FUZZ_MINUTES") else 8  # times that a thread repeats its call, at most


def _model(kind, width):
    config = {"vocab_size": VOCABULARY, "context_length": CONTEXT, "emb_dim": width, "n_heads": 4}
    rest = {"n_layers": LAYERS, "drop_rate": 0.0, "qkv_bias": False}
    model = fastgpt.GPTModel(config | rest).eval()
    if kind.startswith("int"):
        return fastgpt.quantize(model, kind)
    if kind == "column-major":
        with torch.no_grad():
            for p in model.trf_blocks.parameters():
                if p.dim() == 2:
                    p.data = p.data.t().contiguous().t()
    return model.to(getattr(torch, kind, torch.float32))


def _logits(model, ids):
    with torch.no_grad():
        return (model(ids),)


def _cached(model, ids):
    cache = KVCache(LAYERS)
    with torch.no_grad():
        return tuple(model(part, cache=cache) for part in ids.split(9, dim=1))


def _tokens(model, ids):
    room = CONTEXT - ids.shape[1]
    return (fastgpt.generate_text_simple(model, ids[:1], min(room, 8), CONTEXT),)


def _texts(model, ids):
    return tuple(fastgpt.score(model, list(ids)))


def _gradients(model, ids):
    held = {t.dtype for t in (*model.parameters(), *model.buffers())}
    if not held <= {torch.float32, torch.bool}:  # in part PyTorch's own, whose bits follow threads
        return _logits(model, ids)
    return torch.autograd.grad(model.loss(ids, ids), list(model.parameters()))


CALLS = (_logits, _cached, _tokens, _texts, _gradients)


class _Job:
    """One call, which is made again and again; the first time alone."""

    def __init__(self, call, model, ids):
        self.call, self.model, self.ids = call, model, ids
        self.expected = call(model, ids)
        self.wrong = None

    def repeat(self, times, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)  # of this thread's calls
        try:
            for _ in range(times):
                for got, expected in zip(
                    self.call(self.model, self.ids), self.expected, strict=True
                ):
                    assert torch.equal(got, expected)
        except BaseException as error:
            self.wrong = error
        finally:
            torch.set_num_threads(before)


@contextlib.contextmanager
def _busy(cores):
    """So many processes that each keep a core busy."""
    spin = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(cores)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@st.composite
def _jobs(draw):
    models = [
        _model(draw(st.sampled_from(KINDS)), draw(st.sampled_from((64, 192, 384))))
        for _ in range(draw(st.integers(1, 3)))
    ]
    jobs = []
    for _ in range(draw(st.integers(1, 5))):
        shape = draw(st.integers(1, 4)), draw(st.integers(2, CONTEXT))
        ids = torch.randint(0, VOCABULARY, shape)
        jobs.append(_Job(draw(st.sampled_from(CALLS)), draw(st.sampled_from(models)), ids))
    return jobs


@given(
    _jobs(),
    st.lists(st.integers(1, 9), min_size=6, max_size=6),
    st.integers(1, MANY),
    st.sampled_from((0, 0, 0, 0, 0, 1, 2)),
)
def test_side_by_side(jobs, threads, times, busy):
    running = [
        threading.Thread(target=job.repeat, args=(times, n), daemon=True)
        for job, n in zip(jobs, threads, strict=False)
    ]
    with _busy(busy):
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(ENOUGH)
            if thread.is_alive():
                faulthandler.dump_traceback()
                pytest.fail(f"a call takes more than {ENOUGH} s")
    for job in jobs:
        if job.wrong is not None:
            raise job.wrong
    tried.count("calls beside other threads", len(jobs) * times)
    if busy:
        tried.count("calls beside busy processes", len(jobs) * times)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@given(_jobs(), st.integers(1, 9))
def test_after_a_fork(jobs, threads):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks in a process with threads
        child = os.fork()
    if child == 0:
        signal.alarm(ENOUGH)  # ends the child if it hangs
        for job in jobs:
            if job.call is not _gradients:  # autograd's own threads do not survive a fork
                job.repeat(2, 1)  # of more, PyTorch's own operations would wait for those it lost
        os._exit(int(any(job.wrong for job in jobs)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for job in jobs:
        job.repeat(1, threads)
        if job.wrong is not None:
            raise job.wrong
    tried.count("calls after a fork", 2 * len(jobs))
