"""What readers do to a model: steps that a test draws, and applies to the book's model and to ours.

A step is a function of a patient and of drawn arguments, with numbers of its own from torch's
generator. It finds modules by their kind and number: some names differ. One that cannot be done
raises, which it must do on both models.
"""

import contextlib
import copy
import functools
import io
import pickle
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import fastgpt
from fastgpt import reference


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


STEPS = {}
WHICH, FACTOR, COIN = st.integers(0, 40), st.sampled_from([0.5, 1.25, -1.0]), st.booleans()
HALVES = [torch.bfloat16, torch.float16]


def step(**args):
    def register(f):
        STEPS[f.__name__] = (f, args)
        return f

    return register


def steps(names=None, max_size=5):
    """Lists of steps, of all or of those named."""
    one = [
        st.builds(Step, st.just(name), st.fixed_dictionaries(args))
        for name, (_, args) in STEPS.items()
        if names is None or name in names
    ]
    return st.lists(st.one_of(one), max_size=max_size)


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


# Linear layers


class LoRA(nn.Module):
    """As in the book's appendix E: the frozen layer inside, and no weight of its own."""

    def __init__(self, linear, rank=2):
        super().__init__()
        weight = linear.weight
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(like(weight, linear.in_features, rank))
        self.B = nn.Parameter(like(weight, rank, linear.out_features))

    def forward(self, x):
        return self.linear(x) + x @ self.A @ self.B


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu() + 0.5


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight.tanh()


def of_class(cls, linear):
    linear.__class__ = cls
    return linear


def column_major(linear):
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    return linear


def without_bias(linear):
    linear.bias = None
    return linear


def with_bias(linear):
    linear.bias = nn.Parameter(like(linear.weight, linear.out_features))
    return linear


def fresh_linear(linear):
    return nn.Linear(linear.in_features, linear.out_features).to(linear.weight.dtype)


def plain_tensors(module):
    for name, p in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        setattr(module, name, p.detach() * 1.5)
    return module


def factors(linear):
    inner = nn.Linear(linear.in_features, 3, bias=False), nn.Linear(3, linear.out_features)
    return nn.Sequential(*inner).to(linear.weight.dtype)


def parametrized(module):
    name = "weight" if hasattr(module, "weight") else "scale"
    return parametrize.register_parametrization(module, name, Scaled())


def pruned(module, how=prune.l1_unstructured):
    return how(module, "weight" if hasattr(module, "weight") else "scale", amount=0.5)


LINEARS = [
    LoRA,
    functools.partial(of_class, Noisy),
    column_major,
    without_bias,
    with_bias,
    fresh_linear,
    plain_tensors,
    factors,
    parametrized,
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
    pruned,
    functools.partial(pruned, how=prune.random_unstructured),
    lambda linear: nn.Sequential(linear, nn.Identity()),
    lambda linear: nn.Identity(),
]


@step(which=WHICH, how=st.integers(0, len(LINEARS) - 1))
def change_linear(patient, which, how):
    replace(patient, which, is_linear, LINEARS[how])


@step(classes=st.sampled_from([1, 2, 5]))
def classifier(patient, classes):
    """The book's chapter 6."""
    model = patient.model
    model.requires_grad_(False)
    p = next(model.parameters())
    model.out_head = nn.Linear(patient.cfg["emb_dim"], classes).to(p.dtype)
    model.final_norm.requires_grad_(True)
    if len(model.trf_blocks):
        model.trf_blocks[-1].requires_grad_(True)


@step()
def lora_everywhere(patient):
    patient.model.requires_grad_(False)
    names = [n for n, m in patient.model.named_modules() if type(m) is nn.Linear]
    for name in names:
        owner, _, leaf = name.rpartition(".")
        owner = patient.model.get_submodule(owner)
        setattr(owner, leaf, LoRA(getattr(owner, leaf)))


# Norms, dropouts, activations, embeddings

NORMS = [
    lambda norm: nn.LayerNorm(norm.scale.shape, dtype=norm.scale.dtype),
    lambda norm: nn.Identity(),
    plain_tensors,
    parametrized,
    pruned,
]


@step(which=WHICH, how=st.integers(0, len(NORMS) - 1))
def change_norm(patient, which, how):
    replace(patient, which, is_norm, NORMS[how])


@step(which=WHICH, eps=st.sampled_from([0.0, 1e-3, 0.5]))
def change_eps(patient, which, eps):
    picked(patient.model, which, is_norm).eps = eps


DROPOUTS = [nn.Identity, nn.Dropout, functools.partial(nn.Dropout, inplace=True), nn.Tanh]


@step(which=WHICH, how=st.integers(0, len(DROPOUTS) - 1))
def change_dropout(patient, which, how):
    replace(patient, which, is_dropout, lambda _: DROPOUTS[how]())


@step(which=WHICH, p=st.sampled_from([0.0, 0.3, 1.0]))
def change_p(patient, which, p):
    picked(patient.model, which, is_dropout).p = p


@step(which=WHICH)
def drop_in_place(patient, which):
    picked(patient.model, which, is_dropout).inplace = True


@step(which=WHICH, how=st.sampled_from([nn.SiLU, nn.ReLU, nn.GELU, nn.Identity]))
def change_activation(patient, which, how):
    replace(patient, which, is_a("GELU"), lambda _: how())


@step(which=WHICH)
def longer_feed_forward(patient, which):
    layers = picked(patient.model, which, is_feed_forward).layers
    layers.append(fresh_linear(layers[-1]) if layers[-1].in_features == 1 else nn.Tanh())


OPTIONS = {"padding_idx": 1, "max_norm": 1.0, "scale_grad_by_freq": True}


@step(which=WHICH, name=st.sampled_from(list(OPTIONS)))
def embedding_option(patient, which, name):
    setattr(picked(patient.model, which, is_a("Embedding")), name, OPTIONS[name])


@step(more=st.integers(1, 3))
def longer_context(patient, more):
    """A larger table of positions; the masks stay."""
    old = patient.model.pos_emb.weight.detach()
    table = nn.Embedding(old.shape[0] + more, old.shape[1])
    table.weight = nn.Parameter(torch.cat([old, like(old, more, old.shape[1])]))
    patient.model.pos_emb = table


# Blocks and attention


@step(which=WHICH, how=st.sampled_from(["pop", "copy", "share", "swap", "foreign", "reference"]))
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


MASKS = [
    torch.zeros_like,
    banded,
    with_prefix,
    torch.ones_like,
    lambda mask: torch.ones_like(mask).triu(1),
    lambda mask: torch.ones_like(mask).triu(1) * 7,
]


@step(which=WHICH, how=st.integers(0, len(MASKS) - 1), way=st.sampled_from(["copy", "set", "data"]))
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
    name=st.sampled_from(
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


@step(which=WHICH, kind=st.sampled_from(HOOKS), factor=st.none() | FACTOR)
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


WAYS = [
    lambda p, new: p.data.copy_(new),
    in_place,
    lambda p, new: p.data.numpy().__setitem__(..., new.numpy()),
    lambda p, new: setattr(p, "data", new),
    set_storage,
    lambda p, new: torch.utils.swap_tensors(p, nn.Parameter(new)),
    lambda p, new: p.data.flatten()[::2].mul_(-1.5),
    lambda p, new: p.data.view(-1)[: p.numel() // 2].add_(0.25),
]


@step(which=WHICH, way=st.integers(0, len(WAYS) - 1))
def change_weight(patient, which, way):
    _, _, p = any_parameter(patient.model, which)
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


@step(how=st.sampled_from(["deepcopy", "pickle"]))
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
