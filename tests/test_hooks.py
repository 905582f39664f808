"""Hooks on any module see, and change, what they would in the reference, in the same order."""

import pytest
import torch
from pairs import CONFIG, assert_same, assert_same_model, outputs_and_grads, pair, some_ids
from torch import nn

from fastgpt import reference

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")


def watch(model, names, kinds):
    """Hooks of the kinds on the modules named; returns the list they write to."""
    log = []

    def note(name, kind, *values):
        flat = [t for value in values for t in (value if isinstance(value, tuple) else (value,))]
        log.append((name, kind, [t.detach().clone() for t in flat if t is not None]))

    for name in names:
        module = model.get_submodule(name)
        if "pre" in kinds:
            module.register_forward_pre_hook(lambda _, x, name=name: note(name, "pre", x))
        if "forward" in kinds:
            module.register_forward_hook(lambda _, x, y, name=name: note(name, "forward", x, y))
        if "full_backward_pre" in kinds:
            module.register_full_backward_pre_hook(
                lambda _, dy, name=name: note(name, "full_backward_pre", dy)
            )
        if "full_backward" in kinds:
            module.register_full_backward_hook(
                lambda _, dx, dy, name=name: note(name, "full_backward", dx, dy)
            )
    return log


def assert_same_logs(ours, book):
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in book]
    for (name, kind, values), (_, _, right) in zip(ours, book, strict=True):
        assert len(values) == len(right), (name, kind)
        for value, exact in zip(values, right, strict=True):
            assert_same(value, exact, atol=1e-4)


KINDS = ["pre", "forward", "full_backward_pre", "full_backward"]
MODULES = [name for name, _ in reference.GPTModel({**CONFIG, "n_layers": 1}).named_modules()]


# PyTorch says that the ids have no gradient for a backward hook to show.
NO_GRADIENT = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


@NO_GRADIENT
@pytest.mark.parametrize("kinds", [[kind] for kind in KINDS] + [KINDS], ids="-".join)
def test_hooks_on_every_module_at_once(kinds):
    logs, models = [], pair(n_layers=1)
    models[0](some_ids())
    for model in models:
        logs.append(watch(model, MODULES, kinds))
        outputs_and_grads(model, some_ids())
        with torch.no_grad():
            model(some_ids(seed=1))
    assert len(logs[1]) >= len(MODULES)
    assert_same_logs(*logs)


@NO_GRADIENT
@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "model")
def test_hooks_on_one_module(name):
    logs, models = [], pair(n_layers=1)
    for model in models:
        logs.append(watch(model, [name], KINDS))
        outputs_and_grads(model, some_ids())
        with torch.no_grad():
            model(some_ids(seed=1))
    assert {kind for _, kind, _ in logs[1]} == set(KINDS)
    assert_same_logs(*logs)


@pytest.mark.parametrize("name", MODULES[1:])
def test_hooks_that_change_in_place(name):
    if name.endswith("att.dropout"):
        pytest.skip("the softmax needs its own output again")
    models = pair(n_layers=1)
    for model in models:
        model.get_submodule(name).register_forward_hook(lambda _, x, y: y.mul_(0.5))
    assert_same_model(*models)


@pytest.mark.parametrize("name", MODULES[1:])
def test_gradients_for_what_a_hook_adds(name):
    """A steering vector, a prompt, an attack: the only thing that learns, and no parameter."""
    grads = []
    for model in pair(n_layers=1):
        model.requires_grad_(False)
        assert not model(some_ids()).requires_grad
        added = torch.zeros(1, requires_grad=True)
        model.get_submodule(name).register_forward_hook(lambda _, x, y, added=added: y + added)
        model(some_ids()).square().sum().backward()
        grads.append(added.grad)
    assert_same(*grads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODULES[1:])
def test_hooks_that_call_the_model(name):
    """On other ids, in the middle of a call."""
    models = pair(n_layers=1)
    for model in models:

        def again(module, x, y, model=model):
            if model.training:
                model.eval()
                with torch.no_grad():
                    other = model(some_ids(seed=1)).mean()
                model.train()
                return y + other
            return y

        model.get_submodule(name).register_forward_hook(again)
    assert_same_model(*models)


@pytest.mark.parametrize("name", MODULES[1:])
def test_hooks_that_change_what_passes(name):
    models = pair(n_layers=1)
    models[0](some_ids())
    for model in models:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, x, y: 0.5 * y + 0.1)
        if "emb" not in name:
            module.register_forward_pre_hook(lambda _, x: (x[0] * 1.3,))
            module.register_full_backward_pre_hook(lambda _, dy: (dy[0] * 0.9,))
    assert_same_model(*models)


def test_hooks_removed_again():
    ours, book = pair()
    handles = [m.register_forward_hook(lambda _, x, y: y * 2) for m in ours.modules()]
    ours(some_ids())
    for handle in handles:
        handle.remove()
    assert_same_model(ours, book)


def test_global_hooks():
    names = []
    for model in pair():
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, x, y, seen=seen: seen.append(type(module).__name__)
        )
        model(some_ids())
        handle.remove()
        names.append(seen)
    assert names[0] == names[1]
