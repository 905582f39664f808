"""Steps that replace or change a layer: linear layers, norms, dropouts, activations, embeddings."""

import functools

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from .surgery import (
    HALVES,
    WHICH,
    Each,
    is_a,
    is_dropout,
    is_feed_forward,
    is_linear,
    is_norm,
    like,
    picked,
    replace,
    step,
)

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


def orthogonal(linear):
    if linear.weight.dtype in HALVES:
        raise TypeError("PyTorch takes another way, with other parameters")
    return parametrizations.orthogonal(linear)


def in_sequence(linear):
    return nn.Sequential(linear, nn.Identity())


LINEARS = {
    "LoRA": LoRA,
    "subclass": functools.partial(of_class, Noisy),
    "column-major": column_major,
    "without bias": without_bias,
    "with bias": with_bias,
    "fresh": fresh_linear,
    "plain tensors": plain_tensors,
    "factors": factors,
    "parametrized": parametrized,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": orthogonal,
    "pruned": pruned,
    "pruned at random": functools.partial(pruned, how=prune.random_unstructured),
    "in a sequence": in_sequence,
    "identity": lambda _: nn.Identity(),
}


@step(which=WHICH, how=Each(LINEARS))
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

NORMS = {
    "PyTorch's": lambda norm: nn.LayerNorm(norm.scale.shape, dtype=norm.scale.dtype),
    "identity": lambda _: nn.Identity(),
    "plain tensors": plain_tensors,
    "parametrized": parametrized,
    "pruned": pruned,
}


@step(which=WHICH, how=Each(NORMS))
def change_norm(patient, which, how):
    replace(patient, which, is_norm, NORMS[how])


@step(which=WHICH, eps=st.sampled_from([0.0, 1e-3, 0.5]))
def change_eps(patient, which, eps):
    picked(patient.model, which, is_norm).eps = eps


DROPOUTS = {
    "identity": nn.Identity,
    "PyTorch's": nn.Dropout,
    "PyTorch's in place": functools.partial(nn.Dropout, inplace=True),
    "tanh": nn.Tanh,
}


@step(which=WHICH, how=Each(DROPOUTS))
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


@step(which=Each([0, 1]), name=Each(OPTIONS))
def embedding_option(patient, which, name):
    setattr(picked(patient.model, which, is_a("Embedding")), name, OPTIONS[name])


@step(more=st.integers(1, 3))
def longer_context(patient, more):
    """A larger table of positions; the masks stay."""
    old = patient.model.pos_emb.weight.detach()
    table = nn.Embedding(old.shape[0] + more, old.shape[1])
    table.weight = nn.Parameter(torch.cat([old, like(old, more, old.shape[1])]))
    patient.model.pos_emb = table
