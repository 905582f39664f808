"""Random blocks of a training step and whole passes against the book's model in float64, in
poisoned memory.
"""

import philox
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs import shake
from quantized_models import KINDS
from torch import nn
from torch.nn import functional as F

import fastgpt
from fastgpt import cpu, ops, reference
from fastgpt.cpu.forward import PackedSequence
from fastgpt.cpu.records import Block, Linear, Norm
from fastgpt.model.quantization import QuantizedEmbedding, QuantizedLinear
from fastgpt.model.rows import packed_pass, packs
from fastgpt.ops.dropout_seed import draw_seeds
from fastgpt.quantized_weight import dequantize
from fuzz import tried
from fuzz.cases import (
    Attention,
    Rule,
    check,
    few,
    isas_for,
    lengths,
    many_layouts,
    numbers,
    probabilities,
    same_bits,
    seeds,
    thread_count,
    threads,
)
from fuzz.guards import Layout
from fuzz.test_operations import guards as guards
from fuzz.test_operations import pytestmark as pytestmark
from fuzz.test_operations import seeded

BY_COLUMN = Layout(order=1)
some = few.filter(bool)
heads = st.sampled_from([(1, 1), (1, 2), (2, 3), (3, 16), (4, 5), (2, 32), (1, 64), (5, 8)])
formats = st.sampled_from(["float32", "float32", "bfloat16", "float16", "autocast"])


@given(
    some, lengths, heads, st.sampled_from([1, 3, 16, 49, 64]), seeds, many_layouts,
    st.integers(0, 2**17 - 1), threads, probabilities, probabilities, st.booleans(),
    st.sampled_from([torch.float32] * 3 + [torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_transformer_block(guards, B, T, sizes, up, seed, layouts, mask, n, p, q, biased, dtype):
    """Every gradient and any choice of them."""
    guards.clear()
    (H, K), draw = sizes, numbers(seed)
    D = H * K
    parameters = []
    for n_out, n_in in ((D, D), (D, D), (D, D), (D, D), (up, D), (D, up)):
        weight, bias = draw(n_out, n_in) * n_in**-0.5, draw(n_out)
        parameters += [weight, *([bias] if biased else [])]
    norms = [1 + 0.3 * draw(D), draw(D), 1 + 0.3 * draw(D), draw(D)]
    tensors = [t.to(dtype) for t in (draw(B, T, D), *norms, *parameters)]
    torch.default_generator.manual_seed(seed)
    one, *two = draw_seeds(torch.device("cpu"), p, q, q)
    shapes = [(B, H, T, T), (B, T, D), (B, T, D)]
    ones = [torch.ones(shape).double() for shape in shapes]
    keeps = [
        philox.keep(s, shape, rate) if rate else none
        for s, shape, rate, none in zip((one, *two), shapes, (p, q, q), ones, strict=True)
    ]

    def named(scale1, shift1, scale2, shift2, *rest):
        rest = iter(rest)
        query, key, value, out, up, down = (
            Linear(next(rest), next(rest) if biased else None) for _ in range(6)
        )
        first, second = Norm(scale1, shift1), Norm(scale2, shift2)
        return Block(first, query, key, value, out, second, up, down)

    def theirs(x, *flat):
        b, attention, first, second = named(*flat), *(k.to(x.dtype) for k in keeps)
        h = F.layer_norm(x, (D,), *b.norm1)
        q, k, v = (
            F.linear(h, *layer).unflatten(-1, (H, K)).transpose(1, 2)
            for layer in (b.query, b.key, b.value)
        )
        context = Attention.apply(q, k, v, K**-0.5, attention).transpose(1, 2).flatten(2)
        x = x + F.linear(context, *b.out) * first
        h = F.linear(F.layer_norm(x, (D,), *b.norm2), *b.up)
        return x + F.linear(F.gelu(h, approximate="tanh"), *b.down) * second

    def ours(x, *flat):
        y = ops.transformer_block(x, named(*flat), H, p, q)
        assert y is not None
        return y

    weights = [
        BY_COLUMN if t.dim() == 2 and mask >> i & 1 else Layout() for i, t in enumerate(tensors)
    ]
    all_layouts = [layouts[0], *weights[1:], layouts[1]]
    upstream = draw(B, T, D).to(dtype)
    check(
        guards, "transformer_block", seeded(seed, ours), theirs, tensors, all_layouts, [upstream],
        mask, n, in_norm=True,
    )  # fmt: skip


def models(guards, seed, sizes, layers, biased, tied, kind, by_column):
    """Ours in this format and its parameters' names, with its memory guarded, and the book's."""
    (H, K), vocab, context = sizes
    cfg = {
        "vocab_size": vocab, "context_length": context, "emb_dim": H * K, "n_heads": H,
        "n_layers": layers, "drop_rate": 0.0, "qkv_bias": biased,
    }  # fmt: skip
    torch.default_generator.manual_seed(seed)
    ours, book = shake(fastgpt.GPTModel(cfg)).eval(), reference.GPTModel(cfg).eval()
    if tied:
        ours.out_head.weight, book.out_head.weight = ours.tok_emb.weight, book.tok_emb.weight
    book.load_state_dict(ours.state_dict())
    if kind in KINDS:
        ours = fastgpt.quantize(ours, *kind)
        for name, layer in ours.named_modules():
            if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
                stored = dequantize(layer.quantized_weight, torch.float32)
                book.get_submodule(name).weight.data.copy_(stored)
    elif kind != "autocast":
        ours, book = (model.to(getattr(torch, kind)) for model in (ours, book))
    for i, module in enumerate(ours.modules()):
        for p in module.parameters(recurse=False):
            turned = (
                isinstance(module, nn.Linear) and p.dim() == 2 and not tied and by_column >> i & 1
            )
            p.data = guards.place(p.data, BY_COLUMN if turned else Layout())
    return ours, book


def attention(q, k, v, mask, dropout):
    return Attention.apply(q, k, v, k.shape[3] ** -0.5, torch.ones(()))


def books(book, run, narrow):
    """`run` of the book's model as a function of its parameters, and these; narrow: under autocast,
    but for float64.
    """
    names, parameters = zip(*book.named_parameters(), strict=True)

    def theirs(*given):
        def model(ids):
            return torch.func.functional_call(book, dict(zip(names, given, strict=True)), ids)

        autocast = torch.autocast("cpu", torch.bfloat16, narrow and given[0].dtype is torch.float32)
        with pytest.MonkeyPatch.context() as patch, autocast:
            patch.setattr(reference, "causal_attention", attention)
            return run(model)

    return theirs, [p.detach() for p in parameters]


def in_parts(model, ids, cuts):
    """A pass through a cache, the ids cut behind these tokens."""
    cache, cuts = (
        fastgpt.KVCache(len(model.trf_blocks)),
        sorted({c for c in cuts if c < ids.shape[1]}),
    )
    parts = ids.tensor_split(cuts, dim=1)
    return torch.cat([model(part, cache=cache) for part in parts if part.numel()], 1)


@given(
    some, lengths, st.tuples(heads, lengths, st.just(0)), st.sampled_from([1, 2, 0]), st.booleans(),
    st.booleans(), st.one_of(formats, st.sampled_from(KINDS)), seeds, st.integers(0, 2**32 - 1),
    threads, st.lists(st.integers(1, 64), max_size=4), many_layouts,
)  # fmt: skip
@torch.no_grad()
def test_whole_pass(
    guards, B, T, sizes, layers, biased, tied, kind, seed, by_column, n, cuts, layouts
):
    """All at once, through a cache in parts, and as rows of a pack of different lengths. The last
    have the bits that they have alone; inside batch_invariant all have the same bits. A model of
    no layers has nothing to cache.
    """
    guards.clear()
    head, vocab, _ = sizes
    if kind in KINDS:
        head = (3, kind[1]) if kind[1] == 32 else (3, 64)
    elif kind != "float32" and head[0] * head[1] < 16:
        head = (4, 5)  # of a few numbers a norm is little more than their signs
    ours, book = models(guards, seed, (head, vocab, T + 1), layers, biased, tied, kind, by_column)
    torch.default_generator.manual_seed(seed)
    idx = torch.randint(vocab, (B, T))
    ids = guards.place(idx, layouts[0]._replace(expanded=-1))
    narrow = kind == "autocast" or kind in KINDS
    rule = Rule(*books(book, lambda model: model(idx), narrow), None, 1)
    if kind in KINDS and kind[0] == "int8-dynamic":
        rule.times = 4  # as in tests/test_quantization.py
    for isa in isas_for(B * T * head[0] * head[1], seed):
        with cpu.use_isa(isa), torch.autocast("cpu", torch.bfloat16, kind == "autocast"):
            found = []
            for count in (1, n):
                with thread_count(count):
                    y = ours(ids)
                    cached = in_parts(ours, ids, cuts) if layers else y
                found.append([("all at once", y), ("through a cache", cached)])
                tried.count(f"whole passes in {kind if kind in KINDS else (kind,)}")
                tried.count("parts through a cache", 1 + len(cuts))
                guards.check(f"{kind} on {isa}, {count} threads")
            for way, y in found[0]:
                assert y.dtype is (torch.float32 if kind in KINDS else rule.like["output 0"].dtype)
                rule.check_values(["output 0"], [("output 0", y)], f"{way}, {kind} on {isa}")
            same_bits(*found, f"{kind} on {isa}, {n} threads")
            with thread_count(n):
                if not (kind in KINDS and kind[0] == "int4"):
                    check_packed(guards, ours, ids, f"{kind} on {isa}")
                if layers == 0:  # embeddings alone are PyTorch's in 16 bits
                    continue
                with fastgpt.batch_invariant():
                    label = f"{kind} on {isa}, batch_invariant"
                    y, cached = ours(ids), in_parts(ours, ids, cuts)
                    tried.count("whole passes inside batch_invariant")
                    rule.check_values(["output 0"], [("output 0", y)], label)
                    same_bits([("through a cache", cached)], [("all at once", y)], label)
                    check_packed(guards, ours, ids, label)


def check_packed(guards, model, ids, label):
    """Sequences of lengths T, T - 7, .. in packed passes, every token's result and the last's."""
    whole = packed_pass(model)
    if whole is None:
        return
    B, T = ids.shape
    texts = [ids[i, : 1 + (T - 1 - 7 * i) % T] for i in range(B)]
    for pack in packs([len(text) for text in texts]):
        some = [texts[i] for i in pack]
        sequences = [PackedSequence(len(text)) for text in some]
        every = whole.run_packed(torch.cat(some), sequences)
        last = whole.run_packed(torch.cat(some), sequences, last_only=True)
        tried.count("packed passes", 2)
        alone = [model(text[None])[0] for text in some]
        ends = [model.forward_pass(text[None], None, True)[0, 0] for text in some]
        same_bits([("packed", every)], [("alone", torch.cat(alone))], label)
        same_bits([("the last of a pack", last)], [("alone", torch.stack(ends))], label)
    guards.check(f"packed passes, {label}")


@given(
    some, lengths, st.tuples(heads, lengths, st.just(0)), st.sampled_from([1, 2]), st.booleans(),
    st.booleans(), seeds, st.integers(0, 2**32 - 1), threads,
)  # fmt: skip
def test_training_step(guards, B, T, sizes, layers, biased, tied, seed, by_column, n):
    """The loss and every gradient."""
    guards.clear()
    (head, vocab, _), kind = sizes, "float32"
    ours, book = models(guards, seed, (head, vocab, T), layers, biased, tied, kind, by_column)
    torch.default_generator.manual_seed(seed)
    idx, targets = torch.randint(vocab, (2, B, T))
    targets[torch.rand(B, T) < 0.1] = -100
    targets[0, 0] = 0

    def loss(model):
        return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())

    rule = Rule(*books(book, loss, False), [torch.ones(())], 1, in_norm=True)
    for isa in isas_for(B * T * head[0] * head[1], seed):
        with cpu.use_isa(isa):
            found = []
            for count in (1, n):
                with thread_count(count):
                    y = ours.loss(idx, targets)
                    gradients = torch.autograd.grad(y, list(ours.parameters()))
                named = [(f"gradient {i}", g) for i, g in enumerate(gradients)]
                found.append([("output 0", y.detach()), *named])
                tried.count("training steps")
                guards.check(f"a training step on {isa}, {count} threads")
            rule.check(found[0], f"a training step on {isa}")
            same_bits(*found, f"a training step on {isa}, {n} threads")
