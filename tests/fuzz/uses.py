"""What is done with a model under surgery. Each use gives tensors by name, or raises."""

import contextlib
import functools
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastgpt
from fastgpt import reference
from fastgpt.model.generation import new_cache

from .model_steps import in_place
from .surgery import any_parameter, is_feed_forward, like


class Unsuitable(Exception):
    """A use that makes no sense after what was done to a model."""


class Use(NamedTuple):
    name: str
    args: dict


USES = {}
B, T, SEED, WHICH = st.integers(1, 3), st.integers(1, 6), st.integers(0, 3), st.integers(0, 40)
MODES = ["grad", "no_grad", "inference", "autocast", "autocast_no_grad"]


def use(**args):
    def register(f):
        USES[f.__name__] = (f, args)
        return f

    return register


def uses(*names):
    """Uses of these names."""
    return st.one_of(
        [st.builds(Use, st.just(name), st.fixed_dictionaries(USES[name][1])) for name in names]
    )


def put_to(patient, one):
    return USES[one.name][0](patient, **one.args)


def ids_of(patient, B, T, seed, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(patient.cfg["vocab_size"], (B, T), generator=generator).to(dtype)


def weigh(y):
    """A scalar in which every output has its own weight, not linear in any."""
    generator = torch.Generator().manual_seed(11)
    weights = torch.randn(y.shape, generator=generator).to(y.dtype)
    return (y * weights).sum() + (y * y).mean()


@contextlib.contextmanager
def mode_of(mode, model):
    autocast = mode.startswith("autocast") and not is_exact(model)
    grad = mode in ("grad", "autocast")
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(grad))
        if mode == "inference":
            stack.enter_context(torch.inference_mode())
        if autocast:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield


def is_exact(model):
    return all(p.dtype == torch.float64 for p in model.parameters())


def gradients(model):
    return {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}


@use(B=B, T=T, seed=SEED, mode=st.sampled_from(MODES), dtype=st.sampled_from(["int64", "int32"]))
def forward(patient, B, T, seed, mode, dtype):
    model = patient.model
    with mode_of(mode, model):
        y = model(ids_of(patient, B, T, seed, getattr(torch, dtype)))
    return {"output": y.detach(), "learns": torch.tensor([y.requires_grad])}


@use(part=st.sampled_from(["att", "ff", "norm1", ""]), B=B, T=T, which=WHICH)
def a_piece(patient, part, B, T, which):
    """A block or a part of one on numbers, with the gradient of its input."""
    blocks = patient.model.trf_blocks
    piece = blocks[which % len(blocks)].get_submodule(part)
    dtype = next(patient.model.parameters()).dtype
    x = like(torch.empty(0, dtype=dtype), B, T, patient.cfg["emb_dim"]).requires_grad_()
    y = piece(x)
    return {"output": y.detach(), "grad": torch.autograd.grad(weigh(y), x)[0]}


@use(B=B, T=T, seed=SEED, autocast=st.booleans(), again=st.booleans(), twice=st.booleans())
def backward(patient, B, T, seed, autocast, again, twice):
    """Gradients that add up to those of the last time, perhaps; and of a graph gone through twice,
    with an inference in between.
    """
    model = patient.model
    with mode_of("autocast" if autocast else "grad", model):
        y = model(ids_of(patient, B, T, seed))
        if again:
            y = torch.cat([y, model(ids_of(patient, B, T, seed + 1))])
    if twice:
        weigh(y).backward(retain_graph=True)
        with torch.no_grad():
            model(ids_of(patient, 1, 1, 0))
    weigh(y).backward()
    found = {"output": y.detach(), **gradients(model)}
    if seed % 2:
        model.zero_grad(set_to_none=seed == 1)
    return found


def own_loss(model, ids, targets, **rule):
    """By ``loss`` of ours."""
    f = type(model).loss if hasattr(model, "loss") else cross_entropy
    return f(model, ids, targets, **rule)


def cross_entropy(model, ids, targets, **rule):
    """In float32 at least, as ``loss`` of ours."""
    logits = model(ids).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.flatten(), **rule)


@use(
    B=B,
    T=T,
    seed=SEED,
    autocast=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignored=st.sampled_from([-100, 1]),
    grad=st.booleans(),
    twice=st.booleans(),
)
def loss(patient, B, T, seed, autocast, reduction, ignored, grad, twice):
    model, ids = patient.model, ids_of(patient, B, T, seed)
    targets = ids_of(patient, B, T, seed + 1)
    targets[:, 0] = ignored
    rule = {"ignore_index": ignored, "reduction": reduction}
    with mode_of("autocast" if autocast else "grad", model), torch.set_grad_enabled(grad):
        value = own_loss(model, ids, targets, **rule).flatten()
    if grad and T > 1:  # the mean of no target is NaN
        if twice:
            weigh(value).backward(retain_graph=True)
        weigh(value).backward()
    found = {"loss": value.detach(), **gradients(model)}
    model.zero_grad()
    return found


@use(seed=SEED, T=T, n=st.integers(1, 3), clip=st.booleans(), momentum=st.sampled_from([0.0, 0.9]))
def training(patient, seed, T, n, clip, momentum):
    """Steps of an optimiser, with an inference before each."""
    model, losses = patient.model, []
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(learning, lr=0.05, momentum=momentum)
    for i in range(n):
        ids = ids_of(patient, 2, T, seed + i)
        with torch.no_grad():
            model(ids)
        optimiser.zero_grad()
        y = model(ids)
        value = F.cross_entropy(y.flatten(0, 1), ids.flatten() % y.shape[-1])
        value.backward()
        if clip:
            nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        losses.append(value.detach())
    model.zero_grad()
    with torch.no_grad():
        return {"losses": torch.stack(losses), "after": model(ids)}


@use(which=st.just(-1) | WHICH, T=T, own=st.booleans())
def change_before_backward(patient, which, T, own):
    """The gradients, unless the changed parameter's values go into one; -1 is the head's weight."""
    model, ids = patient.model, ids_of(patient, 1, T, 0)
    owner, leaf, p = any_parameter(model, which)
    if kept_to_save_memory(model, owner, leaf):
        raise Unsuitable
    value = own_loss(model, ids, ids) if own else cross_entropy(model, ids, ids)
    in_place(p, p * 0.9)
    try:
        value.backward()
        return {"loss": value.detach(), **gradients(model)}
    finally:
        model.zero_grad()


def kept_to_save_memory(model, owner, leaf):
    """Whether ours may need a parameter's values where the book's keeps a sum that has them: in the
    norms, as PyTorch's own does, and in front of GELU.
    """
    ups = [m.layers[0] for m in model.modules() if is_feed_forward(m)]
    return leaf == "shift" or (leaf == "bias" and owner in ups)


@use(T=T, seed=SEED, reentrant=st.booleans())
def checkpointed(patient, T, seed, reentrant):
    model = patient.model
    y = checkpoint(model.trf_blocks, embedded(patient, T, seed), use_reentrant=reentrant)
    weigh(y).backward()
    found = {"output": y.detach(), **gradients(model)}
    model.zero_grad()
    return found


def embedded(patient, T, seed):
    model, ids = patient.model, ids_of(patient, 2, T, seed)
    return (model.tok_emb(ids) + model.pos_emb(torch.arange(T))).detach().requires_grad_()


# torch.func and beyond


def functional(model, params, ids):
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    if len(names) > len(list(model.modules())):  # PyTorch leaves its own tensors in such a module
        raise Unsuitable
    return torch.func.functional_call(model, params, (ids,))


@use(T=T, seed=SEED, factor=st.sampled_from([0.5, 1.0]), grad=st.booleans())
def functional_call(patient, T, seed, factor, grad):
    params = {k: p.detach() * factor for k, p in patient.model.named_parameters()}
    with torch.set_grad_enabled(grad):
        return {"output": functional(patient.model, params, ids_of(patient, 2, T, seed)).detach()}


@use(T=T, seed=SEED, per_sample=st.booleans())
def functional_grad(patient, T, seed, per_sample):
    params = {k: p.detach() for k, p in patient.model.named_parameters()}

    def value(params, ids):
        return weigh(functional(patient.model, params, ids if ids.dim() > 1 else ids[None]))

    f, ids = torch.func.grad(value), ids_of(patient, 2, T, seed)
    found = torch.func.vmap(f, (None, 0))(params, ids) if per_sample else f(params, ids)
    return {f"grad {n}": g for n, g in found.items()}


@use(T=T, seed=SEED)
def forward_mode(patient, T, seed):
    params = {k: p.detach() for k, p in patient.model.named_parameters()}
    f = functools.partial(functional, patient.model, ids=ids_of(patient, 1, T, seed))
    tangents = {k: like(p) for k, p in params.items()}
    return dict(zip(["output", "tangent"], torch.func.jvp(f, (params,), (tangents,)), strict=True))


@use(T=T, seed=SEED, own=st.booleans())
def double_backward(patient, T, seed, own):
    model, ids = patient.model, ids_of(patient, 1, T, seed)
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    value = own_loss(model, ids, ids) if own else weigh(model(ids))
    first = torch.autograd.grad(value, list(learning.values()), create_graph=True)
    norm = sum(g.square().sum() for g in first)
    second = torch.autograd.grad(norm, list(learning.values()), allow_unused=True)
    return {f"grad {n}": g for n, g in zip(learning, second, strict=True) if g is not None}


@use(T=T, seed=SEED, grad=st.booleans(), traced=st.integers(0, 19))
def compiled(patient, T, seed, grad, traced):
    """Once in twenty times, because it takes seconds."""
    if traced != 13:
        raise Unsuitable
    torch.compiler.reset()
    f = torch.compile(patient.model, backend="eager")
    with torch.set_grad_enabled(grad):
        return {"output": f(ids_of(patient, 2, T, seed)).detach()}


# Generation


class Tokens(NamedTuple):
    """Sequences, the number of given tokens, and how many of the last ones the model sees."""

    rows: list
    given: int
    context: int


@use(B=B, T=T, seed=SEED, new=st.integers(0, 6), context=st.integers(1, 13))
def greedy(patient, B, T, seed, new, context):
    ids = ids_of(patient, B, T, seed)
    ours = isinstance(patient.model, fastgpt.GPTModel)
    f = fastgpt.generate_text_simple if ours else reference.generate_text_simple
    return Tokens(f(patient.model, ids, new, context).tolist(), T, context)


@use(
    T=T,
    seed=SEED,
    new=st.integers(0, 5),
    context=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
    top_k=st.none() | st.integers(1, 4),
    eos_id=st.none() | st.integers(0, 4),
)
def sampled(patient, T, seed, new, context, **how):
    ids = ids_of(patient, 1, T, seed)
    ours = isinstance(patient.model, fastgpt.GPTModel)
    f = fastgpt.generate if ours else reference.generate
    try:
        rows = f(patient.model, ids, new, context, **how)
    except RuntimeError as error:
        if "k out of range" in str(error):  # of fewer classes, which ours takes all
            raise Unsuitable from error
        raise
    return {"tokens": rows} if how["temperature"] else Tokens(rows.tolist(), T, context)


@use(lengths=st.lists(T, min_size=1, max_size=3), seed=SEED, new=st.integers(0, 4), size=B)
def batch(patient, lengths, seed, new, size):
    """Each prompt gets the tokens that it gets alone, in each model as it does."""
    model, context = patient.model, patient.cfg["context_length"]
    prompts = [ids_of(patient, 1, n, seed + i)[0].tolist() for i, n in enumerate(lengths)]
    if isinstance(model, fastgpt.GPTModel):
        rows = fastgpt.generate_batch(model, prompts, new, context, batch_size=size)
    else:
        alone = [
            reference.generate_text_simple(model, torch.tensor([p]), new, context) for p in prompts
        ]
        rows = [one[0].tolist() for one in alone]
    return {f"{n} given": Tokens([row], n, context) for n, row in zip(lengths, rows, strict=True)}


@use(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    seed=SEED,
    stride=st.integers(1, 4),
)
def scores(patient, lengths, seed, stride):
    model, context = patient.model, patient.cfg["context_length"]
    stride = min(stride, context)
    texts = [ids_of(patient, 1, n, seed + i)[0] for i, n in enumerate(lengths)]
    if isinstance(model, fastgpt.GPTModel):
        found = fastgpt.score(model, texts, context, stride)
    else:
        found = [scored(model, text, context, stride) for text in texts]
    return {f"text {i}": one for i, one in enumerate(found)}


def scored(model, text, context, stride):
    parts, done, begin = [], 0, 0
    while done < len(text) - 1:
        end = min(begin + context, len(text) - 1)
        with torch.no_grad():
            logits = model(text[None, begin:end])[0]
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        targets = text[done + 1 : end + 1]
        parts.append(-F.cross_entropy(logits[done - begin :], targets, reduction="none"))
        done, begin = end, begin + stride
    return torch.cat(parts) if parts else torch.empty(0)


@use(B=B, pieces=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=SEED, own=st.booleans())
def cached(patient, B, pieces, seed, own):
    """Tokens fed in pieces, against all at once."""
    model = patient.model
    if sum(pieces) > model.pos_emb.weight.shape[0]:  # which the first pieces are not
        raise Unsuitable
    ids = ids_of(patient, B, sum(pieces), seed)
    if not isinstance(model, fastgpt.GPTModel):
        return {"output": model(ids).detach()}
    if new_cache(model) is None:
        raise Unsuitable
    model.reset_kv_cache()
    cache = None if own else fastgpt.KVCache(len(model.trf_blocks))
    parts = [model(part, use_cache=own, cache=cache) for part in ids.split(pieces, dim=1)]
    return {"output": torch.cat(parts, dim=1).detach()}
