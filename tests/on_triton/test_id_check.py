"""Ids and targets that a GPU finds wrong: no training step waits for it, and the next raises it."""

import contextlib
import threading
import types
import weakref

import pytest
import torch
from gpu_queue import queue_of

import fastgpt
from fastgpt import dispatch, ops
from fastgpt.ops import dropout_seed, id_check
from fastgpt.training import trainer
from fastgpt.training.parallel import Group
from fastgpt.training.report import Report
from fastgpt.training.settings import Settings
from on_triton.support.gpu import fake_gpu
from on_triton.support.unread import unread

CFG = {
    "vocab_size": 61,
    "context_length": 16,
    "emb_dim": 32,
    "n_heads": 2,
    "n_layers": 1,
    "drop_rate": 0.0,
    "qkv_bias": False,
}
IDS = torch.arange(16).view(2, 8)
BAD = IDS + 50  # to 65
LATE = "token id 65 is outside the vocabulary of 61"


@pytest.fixture
def queue(dispatched, monkeypatch):
    """Tensors pass for a GPU's, whose kernels are interpreted."""
    queue = queue_of(monkeypatch)
    yield queue
    id_check._checks.clear()


def _tables():
    return [torch.randn(n, 32, requires_grad=True) for n in (61, 16)]


def _model():
    torch.manual_seed(1)
    return fastgpt.GPTModel(CFG)


def test_the_next_step_raises_a_wrong_id(queue):
    model = _model()
    loss = model.loss(BAD, IDS)
    loss.backward()
    assert loss.isnan()
    with pytest.raises(IndexError, match=LATE):
        model.loss(IDS, IDS)
    assert model.loss(IDS, IDS).isfinite()  # it is raised once


def test_the_next_step_raises_a_wrong_target(queue):
    x, weight = torch.randn(2, 8, 32, requires_grad=True), _tables()[0]
    targets = IDS.clone()
    targets[0, :2] = torch.tensor([-100, -7])
    loss = ops.linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert loss.isnan()
    with pytest.raises(IndexError, match="target -7 is outside the vocabulary of 61"):
        ops.linear_cross_entropy(x, weight, IDS)
    targets[0, 1] = -100
    for _ in range(2):
        assert ops.linear_cross_entropy(x, weight, targets).isfinite()


def test_backward_raises_what_is_known_by_then(queue):
    y = ops.embedding(BAD, *_tables())
    loss = ops.linear_cross_entropy(torch.randn(2, 8, 32), _tables()[0], BAD)
    queue.runs = True
    with pytest.raises(IndexError, match=LATE):
        y.sum().backward()
    loss.backward()  # what is wrong in the same step falls with it
    assert queue.waits == []


def test_backward_in_another_thread_raises_it_too(queue):
    found = []
    for what in ("token id", "target"):
        queue.runs = False
        if what == "target":
            out = ops.linear_cross_entropy(torch.randn(2, 8, 32), _tables()[0], BAD)
        else:
            out = ops.embedding(BAD, *_tables()).sum()
        queue.runs = True

        def backward(out=out, what=what):
            with pytest.raises(IndexError, match=f"{what} 65"):
                out.backward()
            found.append(what)

        _in_thread(backward)
    assert found == ["token id", "target"]


def test_without_gradients_it_is_raised_at_once(queue):
    tables = _tables()
    for _ in range(2):
        with torch.no_grad(), pytest.raises(IndexError, match=LATE):
            ops.embedding(BAD, *tables)
    with torch.no_grad(), pytest.raises(IndexError, match="target 65 is outside"):
        ops.linear_cross_entropy(tables[1], tables[0], BAD.view(16))
    ops.linear_cross_entropy(tables[1], tables[0], BAD.view(16))
    with torch.no_grad(), pytest.raises(IndexError, match="target 65 is outside"):
        ops.embedding(IDS, *tables)


def test_pytorchs_own_operations_never_see_a_wrong_id(queue):
    model = _model()
    with fastgpt.use_backend("reference"), pytest.raises(IndexError, match=LATE):
        model(BAD)
    model.out_head = torch.nn.Linear(32, 61, bias=True)
    with pytest.raises(IndexError, match="target 65 is outside"):
        model.loss(IDS, BAD)


def test_a_second_derivative_waits(queue):
    tok, pos = _tables()
    y = ops.embedding(BAD, tok, pos)
    with pytest.raises(IndexError, match=LATE):
        torch.autograd.grad(y.sum(), tok, create_graph=True)
    x = torch.randn(2, 8, 32, requires_grad=True)
    loss = ops.linear_cross_entropy(x, tok, BAD)
    with pytest.raises(IndexError, match="target 65"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_pytorchs_own_cross_entropy_gives_nan_too(queue):
    x, weight = torch.randn(2, 8, 32, requires_grad=True), torch.randn(61, 32)
    with fastgpt.use_backend("reference"):
        loss = ops.linear_cross_entropy(x, weight, BAD, reduction="none")
        loss.sum().backward()
    assert torch.equal(loss.isnan(), BAD >= 61)
    assert torch.equal(x.grad.isnan().any(-1), BAD >= 61)
    with pytest.raises(IndexError, match="target 65"):
        ops.linear_cross_entropy(x, weight, IDS)


def test_nothing_is_looked_at_while_a_graph_is_captured(queue, monkeypatch):
    tables = _tables()
    ops.embedding(BAD, *tables)
    queue.runs = True
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        ops.embedding(BAD, *tables).sum().backward()
    assert (queue.recorded, len(id_check._checks)) == (1, 1)


def test_of_a_step_two_numbers_are_kept(queue):
    ids = IDS.clone()
    id_check.check_on_gpu(ids, 61)
    gone = weakref.ref(ids)
    del ids
    assert gone() is None
    for _ in range(3):
        id_check.check_on_gpu(IDS, 61)
    (check,) = id_check._checks
    assert check.extremes.read() == [0, 15]


def test_each_thread_has_its_own_errors(queue):
    turns, found = threading.Barrier(2), []

    def wrong():
        id_check.check_on_gpu(BAD, 61)
        turns.wait()
        turns.wait()
        with pytest.raises(IndexError, match=LATE):
            id_check.check_on_gpu(IDS, 61)
        found.append("raised")

    thread = threading.Thread(target=wrong)
    thread.start()
    turns.wait()
    for _ in range(2):
        id_check.check_on_gpu(IDS, 61)
    turns.wait()
    thread.join()
    assert found == ["raised"]


def test_an_ended_threads_error_is_anybodys(queue):
    _in_thread(lambda: id_check.check_on_gpu(BAD, 61))
    with pytest.raises(IndexError, match=LATE):
        id_check.check_on_gpu(IDS, 61)


def test_devices_do_not_wait_for_each_other(queue):
    id_check.check_on_gpu(BAD, 61)
    other = types.SimpleNamespace(device=torch.device("cuda", 1), is_cuda=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "readable", lambda t: True)
        id_check.raise_wrong_ids(other)
    assert queue.waits == []


def _in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@contextlib.contextmanager
def _model_on_fake_gpu(monkeypatch):
    """Yields a model and the kernels that it launches."""
    monkeypatch.setattr(dispatch, "direct", lambda tensors: True)
    monkeypatch.setattr(dropout_seed, "draw_seeds", lambda x, *p: (7,) * len(p))  # by the host
    with fake_gpu("sm_90") as launches:
        torch.set_default_dtype(torch.bfloat16)
        model = fastgpt.GPTModel(fastgpt.GPT_CONFIG_124M | {"n_layers": 1})
        torch.set_default_dtype(torch.float32)
        yield model, launches


def _steps(queue, monkeypatch, look=lambda loss: None):
    """The second training step of a model on a fake GPU, which looks at its loss."""
    with _model_on_fake_gpu(monkeypatch) as (model, launches):
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.zeros(8, 1024, dtype=torch.int64)

        def step():
            queue.step += 1
            loss = model.loss(ids, ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            look(loss)

        unread(step)
        return unread(step), {launch.name for launch in launches}


def test_a_training_step_waits_for_nothing_of_its_own(queue, monkeypatch):
    found, launched = _steps(queue, monkeypatch)
    assert found.waits == []
    assert found.copies == ["to", "to"]  # the extremes of the targets and of the ids
    assert queue.waits == [1, 1]  # for those of the step before
    assert launched >= {"token_bwd_kernel", "cross_entropy_bwd_kernel", "layer_norm_bwd_kernel"}


LOOKS = {
    "a number read": (torch.Tensor.item, "_local_scalar_dense waits for the GPU"),
    "a condition": (lambda loss: bool(loss > 3), "_local_scalar_dense waits for the GPU"),
    "a copy to the host": (lambda loss: loss.cpu(), "cpu copies to the host"),
    "the same by name": (lambda loss: loss.to("cpu"), "to copies to the host"),
    "a copy from the host": (
        lambda loss: torch.as_tensor(1.0, device=loss.device),
        "as_tensor copies from the host",
    ),
    "a comparison": (lambda loss: torch.equal(loss, loss), "equal waits for the GPU"),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_step_that_waits_is_found(queue, monkeypatch, look):
    look, message = LOOKS[look]
    assert _steps(queue, monkeypatch, look)[0].waits == [message]


def test_a_step_of_the_trainer_waits_for_nothing_of_its_own(queue, monkeypatch, tmp_path):
    with _model_on_fake_gpu(monkeypatch) as (model, _):
        ids = torch.zeros(8, 1024, dtype=torch.int64)
        monkeypatch.setattr(model, "to", lambda device: model)  # fake parameters cannot be swapped
        windows = types.SimpleNamespace(context=1024, train=lambda first, count: (ids, ids))
        settings = Settings(steps=9, batch=8, eval_every=9, checkpoint_every=9, lr=1e-3)
        group = Group(0, 1, torch.device("cpu"), False)
        run = trainer.Trainer(model, windows, settings, tmp_path, group, Report())
        run.peak = 1.0

        def step():
            queue.step += 1
            return run._one_step()

        unread(step)
        queue.waits.clear()
        found = unread(step)
    assert found.waits == []
    assert found.copies == ["to"] * 3  # the extremes, and what the log tells
    assert queue.waits == [1] * 3
