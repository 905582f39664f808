"""Steps and uses on the book's model and on ours: results, gradients, what hooks note, random
draws, warnings and errors are alike. PyTorch's own error against float64 is the measure of ours.
"""

import math
import traceback
import warnings
from typing import Any, NamedTuple
from unittest import mock

import torch

import fastgpt
from fastgpt.bench.errors import TIMES

from .surgery import take
from .tried import count
from .uses import Tokens, Unsuitable, put_to

_SIBLINGS = 40
_LUCK = 32  # times the allowed error, past which no luck explains it


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
            # Else a checkpoint's hooks on saved tensors stay, in older torch, with the frame.
            traceback.clear_frames(error.__traceback__)
    warned = {(w.category, str(w.message)[:40]) for w in caught}
    return Outcome(result, list(patient.notes), warned, torch.get_rng_state())


def operate(patients, step):
    """Takes a step on all models. False if it failed, on the book's as on ours; float64 may let it
    through.
    """
    errors = [outcome(patient, take, step).result for patient in patients]
    assert type(errors[0]) is type(errors[1]), errors
    count(f"step {step.name}" if errors[0] is None else f"step {step.name} failed")
    if errors[0] is None:
        assert errors[2] is None, errors
        patients[2].model.double()
    return errors[0] is None


def check(patients, use):
    """patients: ours, the book's, and the book's in float64. What a use leaves in their weights is
    the book's afterwards, so that errors don't grow from use to use.
    """
    before = State(patients[1].model)
    try:
        ours, book = (outcome(patient, put_to, use) for patient in patients[:2])
    except Unsuitable:
        before.put_back(patients[0].model)
        return
    exact = outcome(patients[2], put_to, use)
    if isinstance(ours.result, Exception) or isinstance(book.result, Exception):
        assert_same_error(ours.result, book.result)
        count(f"error {type(ours.result).__name__} of {use.name}")
    else:
        if isinstance(exact.result, Exception):
            raise AssertionError("float64 fails") from exact.result
        assert ours.warned == book.warned
        assert [n[:2] for n in ours.notes] == [n[:2] for n in book.notes]
        Rule(patients[1:], use, before, book, exact).check(ours)
        assert torch.equal(ours.random_state, book.random_state), "random numbers drawn"
        assert_same_tokens(ours.result, book.result, patients[1:])
        count(f"use {use.name}")
    after = State(patients[1].model)
    after.put_back(patients[0].model)
    after.put_back(patients[2].model)


class State:
    """Parameters, buffers and gradients of a model as they are now."""

    def __init__(self, model):
        self.values = [t.detach().clone() for t in _held(model)]
        self.grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    def put_back(self, model, eps=0.0, generator=None):
        """Into a model of the same shape. eps: moves parameters by some such roundings."""
        for t, value in zip(_held(model), self.values, strict=True):
            if eps and isinstance(t, torch.nn.Parameter):
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                value = (value * (1 + 16 * eps * noise)).to(value.dtype)
            t.data.copy_(value)
        for p, grad in zip(model.parameters(), self.grads, strict=True):
            p.grad = None if grad is None else grad.to(p.dtype, copy=True)


def _held(model):
    """Parameters and buffers but for masks, which ours makes when they are read."""
    buffers = (t for name, t in model.named_buffers() if not name.endswith("mask"))
    return [*model.parameters(), *buffers]


class Rule:
    """The error rule for one use: twice PyTorch's error, and one rounding of the largest number,
    the coarsest that the use computes with.

    The gradients and the notes are one result, whose error is the norm of all differences. Of few
    numbers PyTorch's error is a matter of luck. So where ours is larger, PyTorch's is also measured
    on weights moved by some roundings, which are as well conditioned.
    """

    def __init__(self, patients, use, before, book, exact):
        self.patients, self.use, self.before = patients, use, before
        self.book, self.exact = _tensors(book), _tensors(exact)
        self.generator = torch.Generator().manual_seed(0)
        self.left = _SIBLINGS
        self.measure = _errors(self.book, self.exact)

    def check(self, ours):
        ours = _tensors(ours)
        assert ours.keys() == self.book.keys()
        for name, got in ours.items():
            theirs = self.book[name]
            assert (got.shape, got.dtype) == (theirs.shape, theirs.dtype), name
            if not got.is_floating_point():
                assert torch.equal(got, theirs), name
            elif got.dtype is torch.float64:  # there is nothing more exact
                torch.testing.assert_close(got, theirs, equal_nan=True, msg=name)
            elif name in self.exact:  # whose text may have ended sooner, by a near tie
                self._check_finite(name, got, theirs)
        errors, roundings = _errors(ours, self.exact), self._roundings()
        for name, error in errors.items():
            while 1 < error / max(self._allowed(name, roundings), 1e-300) < _LUCK and self.left:
                self._look_at_a_sibling()
            allowed = self._allowed(name, roundings)
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"

    def _check_finite(self, name, got, theirs):
        """Ours may be finite where the book's has passed its dtype's largest number."""
        got, theirs, right = (t.isfinite() for t in (got, theirs, self.exact[name]))
        assert not (theirs & right & ~got).any(), f"{name}: not finite"
        assert not (got & ~theirs & ~right).any(), f"{name}: finite"

    def _allowed(self, name, roundings):
        return TIMES * self.measure[name] + roundings[name]

    def _roundings(self):
        """Gradients are differences of numbers as large as what they are the gradients of."""
        eps, exact = coarsest(self.patients[0].model, self.use), self.exact
        named = [k for k, t in self.book.items() if t.is_floating_point() and k in exact]
        found = _by_kind({name: eps * _size(name, _finite(exact[name])) for name in named})
        if "grad" in found:
            found["grad"] = math.hypot(*found.values())
        return found

    def _look_at_a_sibling(self):
        self.left -= 1
        after = [State(patient.model) for patient in self.patients]
        book, exact = (patient.model for patient in self.patients)
        self.before.put_back(book, coarsest(book, self.use), self.generator)
        State(book).put_back(exact)
        try:
            # By turns, as the transforms of torch.func have no rule for ours.
            softmax = self._fused_softmax if self.left % 2 else torch.softmax
            with mock.patch.object(torch, "softmax", softmax):
                found = [outcome(patient, put_to, self.use) for patient in self.patients]
            if not any(isinstance(one.result, Exception) for one in found):
                for name, error in _errors(*map(_tensors, found)).items():
                    self.measure[name] = max(self.measure.get(name, 0), error)
        finally:
            for state, patient in zip(after, self.patients, strict=True):
                state.put_back(patient.model)

    def _fused_softmax(self, x, dim):
        return Softmax.apply(x, self.generator)


class Softmax(torch.autograd.Function):
    """With the gradient that PyTorch's fused attention has: what a row takes away is dout * out
    there, which is off by other roundings than the sum over keys. Where a weight is near 1, they
    are all that the gradient is.
    """

    @staticmethod
    def forward(ctx, x, generator):
        p = x.softmax(-1)
        ctx.save_for_backward(p)
        ctx.generator = generator
        return p

    @staticmethod
    def backward(ctx, dp):
        (p,) = ctx.saved_tensors
        noise = torch.randn(dp.shape, generator=ctx.generator, dtype=torch.float64)
        moved = dp * (1 + torch.finfo(dp.dtype).eps * noise).to(dp.dtype)
        return p * (dp - (p * moved).sum(-1, keepdim=True)), None


def coarsest(model, use):
    """The rounding of the coarsest numbers that a use computes with."""
    dtypes = {p.dtype for p in model.parameters()}
    args = {} if use is None else use.args
    if args.get("autocast") or args.get("mode", "").startswith("autocast"):
        dtypes.add(torch.bfloat16)
    return max(torch.finfo(dtype).eps for dtype in dtypes | {torch.float32})


def _tensors(one):
    """The results and the notes of an outcome by name."""
    named = one.result if isinstance(one.result, dict) else {}
    named = {k: v for k, v in named.items() if isinstance(v, torch.Tensor)}
    return named | {f"note {i}": note[2] for i, note in enumerate(one.notes)}


def _errors(got, exact):
    """By kind: the differences where both are finite."""
    found = {}
    for name, t in got.items():
        if name not in exact or exact[name].shape != t.shape or not t.is_floating_point():
            continue
        t, right = t.detach().double(), exact[name].detach().double()
        there = t.isfinite() & right.isfinite()
        found[name] = _size(name, (t - right).where(there, 0))
    return _by_kind(found)


def _by_kind(sizes):
    found = {}
    for name, size in sizes.items():
        kind = "grad" if _together(name) else name
        found[kind] = math.hypot(found.get(kind, 0), size)
    return found


def _size(name, t):
    if t.numel() == 0:
        return 0.0
    return (t.norm() if _together(name) else t.abs().max()).item()


def _together(name):
    return name.startswith(("grad", "note"))


def _finite(t):
    return t.detach().double().nan_to_num(0, 0, 0)


def assert_same_error(ours, book):
    too_long = isinstance(ours, ValueError) and "context" in str(ours)
    if too_long and isinstance(book, IndexError | RuntimeError):
        return
    # PyTorch's own attention has no second derivative, and a dropout whose mask is drawn again in
    # the backward pass says that it has none.
    said = ("derivative for aten::_scaled_dot_product", "a fused dropout has no second derivative")
    if not any(text in str(ours) for text in said):
        assert type(ours) is type(book), f"{ours!r} in place of {book!r}"


def assert_same_tokens(ours, book, patients):
    if isinstance(ours, Tokens):
        ours, book = {"tokens": ours}, {"tokens": book}
    for name, one in ours.items() if isinstance(ours, dict) else []:
        if not isinstance(one, Tokens):
            continue
        for got, right in zip(one.rows, book[name].rows, strict=True):
            assert got == right or near_tie(got, right, one.context, patients), (got, right)


def near_tie(got, right, context, patients):
    """Whether two texts part at tokens whose logits are nearer than the errors of both."""
    n = next((i for i, (a, b) in enumerate(zip(got, right, strict=False)) if a != b), None)
    if n is None:
        return False
    with torch.no_grad():
        seen = torch.tensor([right[:n]])[:, -context:]
        like, exact = (patient.model(seen)[0, -1] for patient in patients)
    measure = (like.double() - exact).abs().max().item()
    eps = coarsest(patients[0].model, None)
    allowed = TIMES * measure + eps * exact.abs().max().item()
    return (exact[got[n]] - exact[right[n]]).abs().item() <= measure + allowed
