"""What readers do to a model: how a step is made, drawn, and applied to a model.

A step is a function of a patient and of drawn arguments, with numbers of its own from torch's
generator. It finds modules by their kind and number: some names differ. One that cannot be done
raises, which it must do on both models. The steps are in layer_steps.py and model_steps.py.
"""

import contextlib
import itertools
from typing import NamedTuple

import torch
from hypothesis import strategies as st


class Patient:
    """A model, and what its hooks have noted: (hook, kind, tensor)."""

    def __init__(self, model, cfg, theatre):
        self.model, self.cfg, self.theatre, self.notes = model, cfg, theatre, []


class Theatre(contextlib.ExitStack):
    """Where models are operated on: what is done to classes is done once, and undone at the end."""

    def __init__(self):
        super().__init__()
        self.patched, self.current = set(), None

    def patch(self, owner, name, change):
        if (owner, name) in self.patched:
            return
        self.patched.add((owner, name))
        self.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, change(getattr(owner, name)))


class Step(NamedTuple):
    name: str
    args: dict


class Each(list):
    """Values of an argument, each of which makes a kind of step of its own."""


STEPS = {}
WHICH, FACTOR, COIN = st.integers(0, 40), st.sampled_from([0.5, 1.25, -1.0]), st.booleans()
HALVES = [torch.bfloat16, torch.float16]


def step(**args):
    def register(f):
        STEPS[f.__name__] = (f, args)
        return f

    return register


def kinds():
    """(name, arguments that are given, strategies of the others) of every kind of step."""
    for name, (_, args) in STEPS.items():
        each = {key: value for key, value in args.items() if isinstance(value, Each)}
        rest = {key: value for key, value in args.items() if key not in each}
        for values in itertools.product(*each.values()):
            yield name, dict(zip(each, values, strict=True)), rest


def one_step():
    """A step; all kinds are equally likely."""
    return st.one_of(
        [
            st.builds(Step, st.just(name), st.fixed_dictionaries({**map_just(given), **rest}))
            for name, given, rest in kinds()
        ]
    )


def map_just(given):
    return {key: st.just(value) for key, value in given.items()}


def take(patient, step):
    STEPS[step.name][0](patient, **step.args)


def is_a(*names):
    """Whether a module's class, or one that it is made from, has such a name."""
    return lambda module: any(cls.__name__ in names for cls in type(module).__mro__)


def pick(model, which, test):
    """The name of one of the modules that pass the test."""
    names = [n for n, m in model.named_modules(remove_duplicate=False) if n and test(m)]
    return names[which % len(names)] if names else names[which]


def picked(model, which, test):
    return model.get_submodule(pick(model, which, test))


def replace(patient, which, test, change):
    name = pick(patient.model, which, test)
    owner, _, leaf = name.rpartition(".")
    owner = patient.model.get_submodule(owner)
    setattr(owner, leaf, change(getattr(owner, leaf)))


def any_parameter(model, which):
    """(owner, leaf, parameter)"""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    owner, _, leaf = names[which % len(names)].rpartition(".")
    owner = model.get_submodule(owner)
    return owner, leaf, getattr(owner, leaf)


def like(p, *shape):
    """Random numbers in p's dtype, drawn in float32 so that models of any dtype get the same."""
    return (torch.randn(shape or p.shape, dtype=torch.float32) / 4).to(p.dtype)


is_linear, is_norm, is_dropout = is_a("Linear"), is_a("LayerNorm"), is_a("Dropout")
is_attention, is_feed_forward = is_a("MultiHeadAttention"), is_a("FeedForward")
