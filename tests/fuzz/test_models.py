"""Random surgery on the book's model and on ours: outputs, gradients, random draws, hooks, warnings
and errors stay alike.
"""

import contextlib
import copy
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from helpers import PATHS
from hypothesis import given
from hypothesis import strategies as st
from pairs import shake
from torch import nn

import fastgpt
from fastgpt import reference
from fastgpt.model.modules import Dropout

from .surgery import Patient, Step, Theatre, steps, take
from .tried import count
from .uses import Tokens, Unsuitable, put_to, uses

try:
    from llms_from_scratch.ch04 import GPTModel as BookModel
except ImportError:
    BookModel = reference.GPTModel

ROUNDINGS = 16
# auto passes over the baseline build.
RUNS = [path for path in PATHS if path != "cpu-baseline"]


@st.composite
def configs(draw, drop_rates=(0.0, 0.3)):
    n_heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "vocab_size": draw(st.sampled_from([5, 17, 61])),
        # Not 1: the book's mask of one element would hide as many keys as there are.
        "context_length": draw(st.sampled_from([12, 9, 4, 2])),
        "emb_dim": n_heads * draw(st.sampled_from([4, 8, 20])),
        "n_heads": n_heads,
        "n_layers": draw(st.integers(1, 3)),
        "drop_rate": draw(st.sampled_from(drop_rates)),
        "qkv_bias": draw(st.booleans()),
    }


def admit(cfg, path, theatre):
    """(ours, the book's, the book's in float64) with the same weights."""
    torch.default_generator.manual_seed(123)
    models = [shake(fastgpt.GPTModel(cfg)), BookModel(cfg)]
    models[1].load_state_dict(models[0].state_dict())
    if path != "reference":
        give_our_dropout(models[1])
    models.append(copy.deepcopy(models[1]).double())
    return [Patient(model, cfg, theatre) for model in models]


def give_our_dropout(model):
    """The masks that are promised on a fused path are not those of PyTorch's dropout."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))


class Outcome(NamedTuple):
    """What came of a use: the result or the error, and what else it left."""

    result: Any
    notes: list
    warned: set
    random_state: torch.Tensor


def outcome(patient, f, *args):
    torch.default_generator.manual_seed(5)
    patient.notes.clear()
    patient.theatre.current = patient
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", fastgpt.BackendWarning)
        # PyTorch's own, of the first derivative that it makes in forward mode.
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")
        try:
            result = f(patient, *args)
        except Unsuitable:
            raise
        except Exception as error:
            result = error
    warned = {(w.category, str(w.message)[:40]) for w in caught}
    return Outcome(result, list(patient.notes), warned, torch.get_rng_state())


def operate(patients, step):
    """Takes a step on all models, or on none if it cannot be taken."""
    found = [outcome(patient, take, step) for patient in patients[:2]]
    errors = [one.result for one in found]
    assert type(errors[0]) is type(errors[1]), errors
    if errors[0] is None:
        assert outcome(patients[2], take, step).result is None
        patients[2].model.double()
        count(f"step {step.name}")


def check(patients, use):
    try:
        ours, book = (outcome(patient, put_to, use) for patient in patients[:2])
    except Unsuitable:
        return
    if isinstance(ours.result, Exception) or isinstance(book.result, Exception):
        assert_same_error(ours.result, book.result)
        count(f"error {type(ours.result).__name__} of {use.name}")
        return
    exact = outcome(patients[2], put_to, use)
    if isinstance(exact.result, Exception):
        raise AssertionError("float64 fails") from exact.result
    assert ours.warned == book.warned
    eps = coarsest(patients[0].model, use)
    assert [n[:2] for n in ours.notes] == [n[:2] for n in book.notes]
    notes = ({f"note {i}": n[2] for i, n in enumerate(one.notes)} for one in (ours, book, exact))
    assert_right(*notes, eps)
    assert_right(*(tensors(one.result) for one in (ours, book, exact)), eps)
    assert torch.equal(ours.random_state, book.random_state), "random numbers drawn"
    assert_same_tokens(ours.result, book.result, patients[2], eps)
    count(f"use {use.name}")


def tensors(result):
    named = result if isinstance(result, dict) else {}
    return {k: v for k, v in named.items() if isinstance(v, torch.Tensor)}


def coarsest(model, use):
    """The rounding of the coarsest numbers that a use computes with."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if use.args.get("autocast") or use.args.get("mode", "").startswith("autocast"):
        dtypes.add(torch.bfloat16)
    return max(torch.finfo(dtype).eps for dtype in dtypes | {torch.float32})


def assert_same_error(ours, book):
    too_long = isinstance(ours, ValueError) and "context" in str(ours)
    if too_long and isinstance(book, IndexError | RuntimeError):
        return
    # PyTorch's own attention has no second derivative. A fused backward reads each parameter again,
    # biases too, and so refuses more changes than the book's.
    said = ("derivative for aten::_scaled_dot_product", "modified by an inplace operation")
    if not any(text in str(ours) for text in said):
        assert type(ours) is type(book), f"{ours!r} in place of {book!r}"


def assert_right(ours, book, exact, eps):
    """Each tensor errs at most twice as much as the book's, and some roundings of the largest.

    By luck a single number of the book's may have no error at all.
    """
    assert ours.keys() == book.keys()
    largest = max([1, *(finite(t).abs().max().item() for t in exact.values() if t.numel())])
    for name, right in exact.items():
        got, theirs = ours[name], book[name]
        assert (got.shape, got.dtype) == (theirs.shape, theirs.dtype), name
        if not got.is_floating_point():
            assert torch.equal(got, theirs), name
            continue
        there = theirs.isfinite()
        assert torch.equal(there, got.isfinite()), f"{name}: not finite in other places"
        got, theirs, right = (finite(t.double())[there] for t in (got, theirs, right))
        if right.numel() == 0:
            continue
        error, measure = ((t - right).abs().max().item() for t in (got, theirs))
        allowed = 2 * measure + ROUNDINGS * eps * largest
        assert error <= allowed, f"{name}: error {error:.2e}, the book's {measure:.2e}, {largest=}"


def finite(t):
    return t.detach().double().nan_to_num(0, 0, 0)


def assert_same_tokens(ours, book, exact, eps):
    if isinstance(ours, Tokens):
        ours, book = {"tokens": ours}, {"tokens": book}
    for name, one in ours.items() if isinstance(ours, dict) else []:
        if not isinstance(one, Tokens):
            continue
        for got, right in zip(one.rows, book[name].rows, strict=True):
            assert got == right or near_tie(got, right, one.context, exact, eps), (got, right)


def near_tie(got, right, context, exact, eps):
    """Whether two texts part at tokens that rounding cannot tell apart."""
    n = next((i for i, (a, b) in enumerate(zip(got, right, strict=False)) if a != b), None)
    if n is None:
        return False
    with torch.no_grad():
        logits = exact.model(torch.tensor([right[:n]])[:, -context:])[0, -1]
    gap = (logits[got[n]] - logits[right[n]]).abs().item()
    return gap <= 64 * eps * logits.abs().max().item()


@pytest.fixture(autouse=True)
def _each_warning_each_time():
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def run(path, cfg, actions, training):
    backend = "reference" if path == "reference" else "auto"
    isa = path.partition("-")[2]
    with contextlib.ExitStack() as stack:
        stack.enter_context(fastgpt.use_backend(backend))
        if isa:
            stack.enter_context(fastgpt.cpu.use_isa(isa))
        theatre = stack.enter_context(Theatre())
        patients = admit(cfg, path, theatre)
        for patient in patients:
            patient.model.train(training)
        for action in actions:
            (operate if isinstance(action, Step) else check)(patients, action)


def plans(*names):
    """Steps and uses by turns, as a list."""
    one = st.tuples(steps(max_size=3), st.lists(uses(*names), min_size=1, max_size=2))
    return st.lists(one, min_size=1, max_size=3).map(
        lambda turns: [action for turn in turns for part in turn for action in part]
    )


CASE = {"path": st.sampled_from(RUNS), "cfg": configs(), "training": st.booleans()}


@given(**CASE, actions=plans("forward", "backward", "a_piece", "loss", "training"))
def test_outputs_and_gradients(path, cfg, actions, training):
    run(path, cfg, actions, training)


@given(**CASE, actions=plans("forward", "greedy", "sampled", "batch", "scores", "cached"))
def test_generation(path, cfg, actions, training):
    run(path, cfg, actions, training)


@given(
    **CASE,
    actions=plans(
        "change_before_backward",
        "checkpointed",
        "functional_call",
        "functional_grad",
        "forward_mode",
        "double_backward",
        "compiled",
    ),
)
def test_other_ways_to_differentiate(path, cfg, actions, training):
    run(path, cfg, actions, training)
