"""Random surgery on the book's model and on ours: outputs, gradients, random draws, hooks, warnings
and errors stay alike.
"""

import contextlib
import copy

import pytest
import torch
from helpers import PATHS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS
from pairs import shake
from torch import nn

import fastgpt
from fastgpt import reference
from fastgpt.model.modules import Dropout

from . import layer_steps, model_steps  # noqa: F401  the steps
from .cases import thread_count
from .comparison import check, operate
from .surgery import Patient, Step, Theatre, one_step
from .uses import uses

try:
    from llms_from_scratch.ch04 import GPTModel as BookModel
except ImportError:
    BookModel = reference.GPTModel

# Hypothesis's draws and nothing else. By itself it mostly tries an earlier example again with one
# part of it in place of another, which leaves few examples to what is rare.
AVAILABLE_PROVIDERS["even"] = AVAILABLE_PROVIDERS["hypothesis"]
# auto passes over the baseline build.
RUNS = [path for path in PATHS if path != "cpu-baseline"]


@st.composite
def configs(draw, drop_rates=(0.0, 0.3)):
    n_heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "vocab_size": draw(st.sampled_from([5, 17])),
        # Not 1: the book's mask of one element would hide as many keys as there are.
        "context_length": draw(st.sampled_from([12, 9, 5, 2])),
        "emb_dim": n_heads * draw(st.sampled_from([4, 8])),
        "n_heads": n_heads,
        "n_layers": draw(st.sampled_from([1, 1, 2, 3])),
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


@pytest.fixture(autouse=True)
def _each_warning_each_time():
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def run(path, cfg, actions, training):
    backend = "reference" if path == "reference" else "auto"
    isa = path.partition("-")[2]
    with contextlib.ExitStack() as stack:
        stack.enter_context(thread_count(1))  # a second one has nothing to do but to wait
        stack.enter_context(fastgpt.use_backend(backend))
        if isa:
            stack.enter_context(fastgpt.cpu.use_isa(isa))
        theatre = stack.enter_context(Theatre())
        patients = admit(cfg, path, theatre)
        for patient in patients:
            patient.model.train(training)
        for action in actions:
            if not isinstance(action, Step):
                check(patients, action)
            elif not operate(patients, action):
                return


def plans(*names):
    """Steps and a use by turns, as a list."""
    turn = st.tuples(st.lists(one_step(), min_size=1, max_size=3), uses(*names))
    return st.lists(turn, min_size=1, max_size=3).map(
        lambda turns: [action for steps, use in turns for action in (*steps, use)]
    )


CASE = {"path": st.sampled_from(RUNS), "cfg": configs(), "training": st.booleans()}
PLANS = {
    "outputs_and_gradients": plans("forward", "backward", "a_piece", "loss", "training"),
    "generation": plans("forward", "greedy", "sampled", "batch", "scores", "cached"),
    "other_ways_to_differentiate": plans(
        "change_before_backward",
        "checkpointed",
        "functional_call",
        "functional_grad",
        "forward_mode",
        "double_backward",
        "compiled",
    ),
}


@settings(backend="even")
@given(**CASE, actions=PLANS["outputs_and_gradients"])
def test_outputs_and_gradients(path, cfg, actions, training):
    run(path, cfg, actions, training)


@settings(backend="even")
@given(**CASE, actions=PLANS["generation"])
def test_generation(path, cfg, actions, training):
    run(path, cfg, actions, training)


@settings(backend="even")
@given(**CASE, actions=PLANS["other_ways_to_differentiate"])
def test_other_ways_to_differentiate(path, cfg, actions, training):
    run(path, cfg, actions, training)
