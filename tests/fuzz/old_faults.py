"""Faults that fastgpt once had, or kinds of them, to be put back: random surgery must find each.

``python -m fuzz.old_faults``, with tests/ and the repository on PYTHONPATH, puts back one after the
other and says how many examples of test_models.py, and how many seconds, it took to find it.
"""

import math
import sys
import time
import weakref

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import nn

from fastgpt import dispatch
from fastgpt.cpu import forward
from fastgpt.model import cache, fusable, generation, gpt, modules
from fastgpt.model.fusable import KNOWN

FAULTS = {}


def fault(f):
    FAULTS[f.__name__.replace("_", " ")] = f
    return f


def everywhere(patch, old, new):
    """In place of a function in every module that has imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastgpt"):
            for key, value in list(vars(module).items()):
                if value is old:
                    patch.setattr(module, key, new)


def blind_to(patch, *names):
    """Modules count as unmodified whatever they have under these names."""

    def alone_unmodified(module, cls):
        if type(module) is not cls:
            return False
        held = {k: v for k, v in module.__dict__.items() if k not in names}
        return "forward" not in held and not any(
            held.get(k) for k in (*fusable._HOOKS, "_compiled_call_impl")
        )

    everywhere(patch, fusable.alone_unmodified, alone_unmodified)


def table_blind_to(patch, name):
    """An embedding's option is overlooked."""
    defaults = {"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False}

    def blind(function):
        def look(module):
            held = getattr(module, name, None)
            if held is not None:
                setattr(module, name, defaults[name])
            try:
                return function(module)
            finally:
                if held is not None:
                    setattr(module, name, held)

        return look

    patch.setattr(gpt, "_table", blind(gpt._table))
    patch.setattr(gpt, "_rows_of", blind(gpt._rows_of))


@fault
def padding_idx_of_an_embedding(patch):
    table_blind_to(patch, "padding_idx")


@fault
def scale_grad_by_freq_of_an_embedding(patch):
    table_blind_to(patch, "scale_grad_by_freq")


@fault
def max_norm_of_an_embedding(patch):
    table_blind_to(patch, "max_norm")


@fault
def a_hook_before_the_backward_pass(patch):
    blind_to(patch, "_backward_pre_hooks")


@fault
def a_hook_before_the_forward_pass(patch):
    blind_to(patch, "_forward_pre_hooks")


@fault
def a_forward_set_on_an_instance(patch):
    blind_to(patch, "forward")


@fault
def a_forward_set_on_a_class(patch):
    everywhere(patch, fusable.classes_unmodified, lambda: not fusable.has_global_hooks())


@fault
def a_hook_on_every_module(patch):
    patch.setattr(fusable, "has_global_hooks", lambda: False)


@fault
def a_mask_that_hides_as_many(patch):
    """An edited mask counted by its sum."""

    def is_causal(mask):
        n = mask.shape[0]
        return int(mask.bool().sum()) == n * (n - 1) // 2

    patch.setattr(modules, "is_causal", is_causal)


@fault
def an_edited_mask(patch):
    patch.setattr(modules, "is_causal", lambda mask: True)


@fault
def eps_of_the_second_norm(patch):
    record = modules.TransformerBlock.record

    def look(self):
        held = getattr(self.norm2, "eps", None)
        if held is not None:
            self.norm2.eps = getattr(self.norm1, "eps", held)
        try:
            return record(self)
        finally:
            if held is not None:
                self.norm2.eps = held

    patch.setattr(modules.TransformerBlock, "record", look)


@fault
def the_mask_of_another_dropout(patch):
    """PyTorch's own, or one in place, drew ours where it was fused."""

    def drop_probability(dropout):
        cls = type(dropout)
        if cls not in KNOWN or not issubclass(cls, (nn.Dropout, nn.Identity)):
            return None
        if not fusable.is_unmodified(dropout, cls):
            return None
        return dropout.p if dropout.training and cls is not nn.Identity else 0.0

    everywhere(patch, fusable.drop_probability, drop_probability)


@fault
def stale_weights(patch):
    """A copy of the head's weight, kept until PyTorch counts a change."""
    kept, record = weakref.WeakKeyDictionary(), gpt.GPTModel._end_record

    def stale(self, with_head=True):
        found = record(self, with_head)
        if found is None or found.head is None or not isinstance(found.head.weight, torch.Tensor):
            return found
        weight = found.head.weight
        key = weight.data_ptr(), weight._version, weight.dtype, weight.shape
        if kept.get(self, (None,))[0] != key:
            kept[self] = key, weight.detach().clone()
        return found._replace(head=found.head._replace(weight=kept[self][1]))

    patch.setattr(gpt.GPTModel, "_end_record", stale)


@fault
def a_weight_changed_before_backward(patch):
    """The loss has made its gradients by then, and did not look."""
    function = sys.modules["fastgpt.ops.linear_cross_entropy"]._LinearCrossEntropy
    make = function.forward

    def unseen(ctx, run, x, weight, targets, *rest):
        loss = make(ctx, run, x, weight, targets, *rest)
        ctx.save_for_backward(x.detach().clone(), weight.detach().clone(), targets)
        return loss

    patch.setattr(function, "forward", staticmethod(unseen))


@fault
def the_bias_of_the_head_in_the_loss(patch):
    loss = gpt.GPTModel.loss

    def without(self, *args, **kwargs):
        held = self.out_head._parameters.get("bias") if type(self.out_head) is nn.Linear else None
        if held is None:
            return loss(self, *args, **kwargs)
        self.out_head._parameters["bias"] = None
        try:
            return loss(self, *args, **kwargs)
        finally:
            self.out_head._parameters["bias"] = held

    patch.setattr(gpt.GPTModel, "loss", without)


@fault
def dtype_of_a_result(patch):
    """Of what C++ writes: torch's default, whatever the model's is."""
    patch.setattr(forward, "_FLOAT32", {"device": "cpu"})
    empty = torch.empty

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *shape, dtype=None, device=None):
            return empty(*shape)

    patch.setattr(forward, "torch", Torch())


@fault
def autocast_of_a_linear_layer(patch):
    """Products stay float32."""
    patch.setattr(dispatch, "autocasts", lambda x: False)


@fault
def a_module_without_a_rule_in_cached_generation(patch):
    """A cache whatever the modules are."""

    def always(model):
        return cache.KVCache(len(model.trf_blocks)) if isinstance(model, gpt.GPTModel) else None

    everywhere(patch, generation.new_cache, always)


@fault
def a_parameter_in_two_places_in_a_second_derivative(patch):
    """Each place had the gradient of both."""
    block = sys.modules["fastgpt.ops.transformer_block"]

    def gradients(dy, x, p, n_heads, eps, wanted):
        inputs = [t for t, want in zip((x, *p.flat()), wanted, strict=True) if want]
        with torch.enable_grad():
            y = block._torch(x, p, n_heads, eps)
            found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
        return [next(found) if want else None for want in wanted]

    patch.setattr(block, "_differentiable_gradients", gradients)


def search(rounds=1000, seconds=math.inf, plans=()):
    """50 examples of each test by turns, until one fails: (how many, the failure or None)."""
    from . import test_models

    tried, failure, end = 0, None, time.monotonic() + seconds

    def run(**case):
        nonlocal tried, failure
        if time.monotonic() > end or failure is not None:
            return
        tried += 1
        try:
            test_models.run(**case)
        except Exception as error:
            failure = error

    quiet = settings(
        max_examples=50,
        backend="even",
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for number in range(rounds):
        for name in plans or test_models.PLANS:
            test = given(**test_models.CASE, actions=test_models.PLANS[name])(run)
            quiet(seed(number)(test))()
            if time.monotonic() > end or failure is not None:
                return tried, failure
    return tried, failure


def main():
    torch.set_warn_always(True)
    names = sys.argv[1:] or FAULTS
    for name in names:
        with pytest.MonkeyPatch.context() as patch:
            FAULTS.get(name, lambda _: None)(patch)
            since = time.monotonic()
            tried, failure = search(seconds=120)
            seconds = time.monotonic() - since
        said = (
            "" if failure is None else f"{type(failure).__name__}: {failure}".splitlines()[0][:80]
        )
        print(f"| {name} | {seconds:.0f} | {tried} | {said}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
