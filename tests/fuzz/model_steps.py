"""Steps on blocks and attention, on what learns, on forwards and hooks, and on weights."""

import contextlib
import copy
import functools
import io
import pickle

import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastgpt
from fastgpt import reference

from .surgery import (
    COIN,
    FACTOR,
    HALVES,
    WHICH,
    Each,
    any_parameter,
    is_a,
    is_attention,
    is_norm,
    like,
    picked,
    replace,
    step,
)

# Blocks and attention


@step(which=WHICH, how=Each(["pop", "copy", "share", "swap", "foreign", "reference"]))
def change_blocks(patient, which, how):
    blocks = patient.model.trf_blocks
    n = which % len(blocks)
    if how == "pop":
        del blocks[n]
    elif how == "copy":
        blocks.append(copy.deepcopy(blocks[n]))
    elif how == "share":
        blocks.append(blocks[n])
    elif how == "swap":
        first, last = blocks[n], blocks[-1]
        blocks[n], blocks[-1] = last, first
    elif how == "foreign":
        blocks.insert(n, nn.Sequential(nn.Identity(), nn.Tanh()))
    else:
        p = next(blocks.parameters())
        blocks[n] = reference.TransformerBlock(patient.cfg).to(p.dtype)


def banded(mask):
    return mask.triu(1) + mask.new_ones(mask.shape).tril(-2)


def with_prefix(mask):
    mask[:2, :2] = 0
    return mask


MASKS = {
    "hides nothing": torch.zeros_like,
    "hides all": torch.ones_like,
    "banded": banded,
    "with a prefix": with_prefix,
    "hides the past": lambda mask: torch.ones_like(mask).tril(-1),
    "causal": lambda mask: torch.ones_like(mask).triu(1),
    "causal in sevens": lambda mask: torch.ones_like(mask).triu(1) * 7,
}


@step(which=WHICH, how=Each(MASKS), way=st.sampled_from(["copy", "set", "data"]))
def edit_mask(patient, which, how, way):
    att = picked(patient.model, which, is_attention)
    mask = MASKS[how](att.mask.clone())
    if way == "copy":
        att.mask.copy_(mask)
    elif way == "data":
        att.mask.data = mask
    else:
        att.mask = mask.bool()


@step(which=WHICH, heads=st.sampled_from([1, 2, 4]))
def change_heads(patient, which, heads):
    att = picked(patient.model, which, is_attention)
    att.num_heads, att.head_dim = heads, att.d_out // heads


@step(which=WHICH)
def other_attention(patient, which):
    width = patient.cfg["emb_dim"]
    p = next(patient.model.parameters())
    new = nn.Sequential(nn.Linear(width, width), nn.Tanh()).to(p.dtype)
    replace(patient, which, is_attention, lambda _: new)


# What learns, what is tied, of which dtype


@step(tie=COIN)
def tie(patient, tie):
    model = patient.model
    weight = model.tok_emb.weight
    model.out_head.weight = weight if tie else nn.Parameter(weight.detach().clone())


@step(which=WHICH)
def tie_two(patient, which):
    """Two layers of a block learn as one."""
    block = picked(patient.model, which, is_a("TransformerBlock"))
    block.att.W_value.weight = block.att.W_query.weight
    block.norm2.scale = block.norm1.scale


@step(bits=st.integers(0, 2**32 - 1))
def freeze(patient, bits):
    for i, p in enumerate(patient.model.parameters()):
        p.requires_grad_(bool(bits >> i % 32 & 1))


@step(which=WHICH, learns=COIN)
def freeze_one(patient, which, learns):
    any_parameter(patient.model, which)[2].requires_grad_(learns)


@step(dtype=st.sampled_from([*HALVES, torch.float32]))
def cast(patient, dtype):
    patient.model.to(dtype)


@step(which=WHICH, dtype=st.sampled_from([torch.float64, *HALVES]))
def cast_one(patient, which, dtype):
    picked(patient.model, which, lambda m: True).to(dtype)


# Forwards and hooks


@step(which=WHICH, factor=FACTOR)
def patch_instance(patient, which, factor):
    module = picked(patient.model, which, lambda m: not is_a("Embedding", "Sequential")(m))
    forward = module.forward
    module.forward = lambda *args: forward(*args) * factor


@step(
    name=Each(
        ["LayerNorm", "GELU", "FeedForward", "MultiHeadAttention", "TransformerBlock", "Linear"]
    ),
    factor=FACTOR,
)
def patch_class(patient, name, factor):
    def change(forward):
        return lambda self, *args: forward(self, *args) * factor

    for module in patient.model.modules():
        if type(module).__name__ == name:
            patient.theatre.patch(type(module), "forward", change)


@step(which=WHICH, factor=FACTOR)
def subclass(patient, which, factor):
    module = picked(patient.model, which, lambda m: not is_a("Embedding", "Sequential")(m))
    cls = type(module)
    module.__class__ = type(
        cls.__name__, (cls,), {"forward": lambda self, *args: cls.forward(self, *args) * factor}
    )


@step(which=WHICH, reentrant=COIN)
def checkpoint_block(patient, which, reentrant):
    blocks = patient.model.trf_blocks
    block = blocks[which % len(blocks)]
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)


def changed(value, factor):
    """What a hook gives back: None, or a floating tensor, alone or in a tuple, times the factor."""
    if factor is None:
        return None
    if isinstance(value, tuple):
        return tuple(changed(v, factor) if isinstance(v, torch.Tensor) else v for v in value)
    return value * factor if value.is_floating_point() else value


HOOKS = ["forward", "forward_pre", "full_backward", "full_backward_pre"]


@step(which=WHICH, kind=Each(HOOKS), factor=st.none() | FACTOR)
def hook(patient, which, kind, factor):
    module = picked(patient.model, which, lambda m: True)

    def note(_, *values):
        tensors = [v[0] if isinstance(v, tuple) else v for v in values]
        patient.notes += [(which, kind, t.detach().clone()) for t in tensors if t is not None]
        # A backward hook has the gradients of the inputs and then of the outputs: it changes those.
        return changed(values[0 if kind == "full_backward" else -1], factor)

    getattr(module, f"register_{kind}_hook")(note)


@step(which=WHICH, factor=FACTOR)
def hook_gradient(patient, which, factor):
    any_parameter(patient.model, which)[2].register_hook(lambda g: g * factor)


@step(factor=st.none() | FACTOR)
def hook_every_module(patient, factor):
    theatre = patient.theatre

    def note(module, args, y):
        theatre.current.notes.append(("every", type(module).__name__, y.detach().clone()))
        return changed(y, factor) if is_norm(module) else None

    if "every" not in theatre.patched:
        theatre.patched.add("every")
        theatre.enter_context(
            contextlib.closing(_Handle(nn.modules.module.register_module_forward_hook(note)))
        )


class _Handle:
    def __init__(self, handle):
        self.close = handle.remove


# Weights that change


def set_storage(p, new):
    with torch.no_grad():
        p.set_(new)


def in_place(p, new):
    with torch.no_grad():
        p.copy_(new)


def by_numpy(p, new):
    """By bytes: numpy has no bfloat16."""
    p.data.view(torch.uint8).numpy()[...] = new.view(torch.uint8).numpy()


WAYS = {
    "data": lambda p, new: p.data.copy_(new),
    "in place": in_place,
    "numpy": by_numpy,
    "data set": lambda p, new: setattr(p, "data", new),
    "storage set": set_storage,
    "half of it": lambda p, new: p.data.view(-1)[: p.numel() // 2].add_(0.25),
}


@step(which=st.none() | WHICH, way=Each(WAYS))
def change_weight(patient, which, way):
    """One, or all."""
    model = patient.model
    for p in model.parameters() if which is None else [any_parameter(model, which)[2]]:
        WAYS[way](p, like(p))


@step(which=WHICH)
def new_parameter(patient, which):
    owner, leaf, p = any_parameter(patient.model, which)
    setattr(owner, leaf, nn.Parameter(like(p)))


@step(assign=COIN, masks=COIN)
def load(patient, assign, masks):
    """Weights 0.9 times as large, through a file."""
    model, file = patient.model, io.BytesIO()
    state = {k: v.detach() * 0.9 if v.is_floating_point() else v for k, v in state_of(model)}
    state = {k: v for k, v in state.items() if not k.endswith("mask") or masks}
    torch.save(state, file)
    file.seek(0)
    model.load_state_dict(torch.load(file), strict=False, assign=assign)


def state_of(model):
    # A mask times 0.9 would hide the same keys.
    return model.state_dict().items()


@step(how=Each(["deepcopy", "pickle"]))
def duplicate(patient, how):
    if how == "deepcopy":
        patient.model = copy.deepcopy(patient.model)
    else:
        patient.model = pickle.loads(pickle.dumps(patient.model))


@step(mode=COIN)
def train_mode(patient, mode):
    patient.model.train(mode)


@step(which=WHICH, mode=COIN)
def train_mode_of_one(patient, which, mode):
    picked(patient.model, which, lambda m: True).train(mode)


@step()
def look(patient):
    """Reads what must change nothing."""
    model = patient.model
    model.state_dict()
    _ = [att.mask for att in model.modules() if is_attention(att)]
    if isinstance(model, fastgpt.GPTModel):
        fastgpt.explain(model)
