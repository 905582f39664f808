"""Random calls of each operation against float64, in poisoned memory."""

import philox
import pytest
import torch
from helpers import PAIRS
from hypothesis import given
from hypothesis import strategies as st
from quantized_models import KINDS
from torch.nn import functional as F

from fastgpt import cpu, ops
from fastgpt.cpu import linear as linear_kernels
from fastgpt.cpu import records
from fastgpt.ops.dropout_seed import draw_seeds
from fastgpt.quantized_weight import dequantize, quantize_weight
from fuzz import tried
from fuzz.cases import (
    Attention,
    Rule,
    call,
    check,
    dtypes,
    few,
    many_layouts,
    masks,
    numbers,
    probabilities,
    same_bits,
    seeds,
    sizes,
    thread_count,
    threads,
    widths,
)
from fuzz.guards import Guards

pytestmark = [
    pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing)),
    pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex values"),
]


@pytest.fixture
def guards(monkeypatch):
    """Threads share work however little there is."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(records, "GRAIN", 0)
    return Guards(monkeypatch)


def kept(seed, p, *shape):
    """What a dropout multiplies by, and a function that has it drawn once more."""
    torch.default_generator.manual_seed(seed)
    (drawn,) = draw_seeds(torch.device("cpu"), p)
    return philox.keep(drawn, shape, p) if p > 0 else torch.ones(shape).double()


def narrow(x, *_):
    """Whether operations with kernels for 16 bits have some for x."""
    return x.dtype is not torch.float64


def takes(x, weight, bias=None):
    return x.dtype is torch.float32 and linear_kernels.takes(weight, bias)


def seeded(seed, f):
    def run(*tensors):
        torch.default_generator.manual_seed(seed)
        return f(*tensors)

    return run


@given(few, sizes, widths, dtypes, seeds, many_layouts, masks, threads)
def test_layer_norm(guards, B, T, D, dtype, seed, layouts, mask, n):
    guards.clear()
    draw = numbers(seed)
    tensors = [draw(B, T, D) * 3 + 1, draw(D), draw(D), draw(B, T, D)]
    *tensors, upstream = (t.to(dtype) for t in tensors)

    def theirs(x, weight, bias):
        return F.layer_norm(x, (D,), weight, bias)

    check(
        guards, "layer_norm", ops.layer_norm, theirs, tensors, layouts, [upstream], mask, n, narrow
    )


@given(few, sizes, widths, dtypes, seeds, many_layouts, masks, threads, probabilities)
def test_add_layer_norm(guards, B, T, D, dtype, seed, layouts, mask, n, p):
    guards.clear()
    draw = numbers(seed)
    tensors = [draw(B, T, D), draw(B, T, D), draw(D), draw(D), draw(B, T, D), draw(B, T, D)]
    *tensors, one, two = (t.to(dtype) for t in tensors)
    keep = kept(seed, p, B, T, D) if B * T else torch.ones(B, T, D).double()

    def theirs(x, branch, weight, bias):
        total = x + branch * keep.to(x.dtype)
        return F.layer_norm(total, (D,), weight, bias), total

    ours = seeded(seed, lambda *tensors: ops.add_layer_norm(*tensors, dropout_p=p))
    check(guards, "add_layer_norm", ours, theirs, tensors, layouts, [one, two], mask, n, narrow)


@given(few, sizes, sizes, dtypes, seeds, many_layouts, masks, threads, st.booleans())
def test_gelu(guards, B, T, N, dtype, seed, layouts, mask, n, biased):
    guards.clear()
    draw = numbers(seed)
    tensors = [(draw(B, T, N) * 3).to(dtype), *([draw(N).to(dtype)] if biased else [])]

    def theirs(x, bias=None):
        return F.gelu(x if bias is None else x + bias, approximate="tanh")

    ours = ops.bias_gelu if biased else ops.gelu
    upstream = [draw(B, T, N).to(dtype)]
    check(guards, ours.__name__, ours, theirs, tensors, layouts, upstream, mask, n)


@given(
    few, few, sizes, sizes, widths, dtypes, seeds, many_layouts, masks, threads, probabilities,
    st.sampled_from([None, 0.5, 1e-30, 4.0]),
)  # fmt: skip
def test_causal_attention(guards, B, H, T, past, D, dtype, seed, layouts, mask, n, p, scale):
    guards.clear()
    draw, S = numbers(seed), T + past
    tensors = [draw(B, H, T, D), draw(B, H, S, D), draw(B, H, S, D), draw(B, H, T, D)]
    *tensors, upstream = (t.to(dtype) for t in tensors)
    keep = kept(seed, p, B, H, T, S) if B * H * T * S else torch.ones(B, H, T, S).double()

    def theirs(q, k, v):
        return Attention.apply(q, k, v, D**-0.5 if scale is None else scale, keep)

    ours = seeded(seed, lambda *qkv: ops.causal_attention(*qkv, scale, p))
    check(
        guards, "causal_attention", ours, theirs, tensors, layouts, [upstream], mask, n,
        in_norm=True,
    )  # fmt: skip


@given(
    few, sizes, widths, widths, few, dtypes, seeds, many_layouts, masks, threads, probabilities,
    st.sampled_from([torch.int32, torch.int64]),
)  # fmt: skip
def test_embedding(guards, B, T, D, V, past, dtype, seed, layouts, mask, n, p, ids):
    guards.clear()
    draw, C = numbers(seed), past + T + V % 3
    tensors = [draw(V, D).to(dtype), draw(C, D).to(dtype)]
    torch.default_generator.manual_seed(seed)
    idx = guards.place(torch.randint(V, (B, T)).to(ids), layouts[-1]._replace(expanded=-1))
    keep = kept(seed, p, B, T, D) if B * T else torch.ones(B, T, D).double()

    def theirs(tok, pos):
        return (F.embedding(idx, tok) + pos[past : past + T]) * keep.to(tok.dtype)

    ours = seeded(seed, lambda tok, pos: ops.embedding(idx, tok, pos, past, p))
    upstream = [draw(B, T, D).to(dtype)]
    check(guards, "embedding", ours, theirs, tensors, layouts, upstream, mask, n)


# Of one column PyTorch makes dot products, whose sums are of shorter chains than ours.
@given(
    few, sizes, widths, sizes.filter(lambda n: n != 1), dtypes, seeds, many_layouts, masks, threads,
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_linear(guards, B, T, K, N, dtype, seed, layouts, mask, n, biased, gelu):
    guards.clear()
    draw = numbers(seed)
    tensors = [draw(B, T, K), draw(N, K), *([draw(N)] if biased or gelu else []), draw(B, T, N)]
    *tensors, upstream = (t.to(dtype) for t in tensors)

    def theirs(*tensors):
        y = F.linear(*tensors)
        return F.gelu(y, approximate="tanh") if gelu else y

    ours = ops.linear_gelu if gelu else ops.linear
    check(guards, ours.__name__, ours, theirs, tensors, layouts, [upstream], mask, n, takes)


@given(
    sizes, widths, widths, dtypes, seeds, many_layouts, masks, threads,
    st.sampled_from(["mean", "sum", "none"]), st.sampled_from([-100, 0, 3]),
)  # fmt: skip
def test_linear_cross_entropy(guards, N, D, V, dtype, seed, layouts, mask, n, reduction, ignored):
    guards.clear()
    draw = numbers(seed)
    tensors = [draw(N, D).to(dtype), draw(V, D).to(dtype)]
    torch.default_generator.manual_seed(seed)
    targets = torch.randint(V, (N,))
    targets[torch.rand(N) < 0.2] = ignored
    if ignored >= V:
        targets[targets >= V] = 0
    targets = guards.place(targets, layouts[-1]._replace(expanded=-1))
    kind = torch.promote_types(dtype, torch.float32)

    def theirs(x, weight):
        logits = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction=reduction, ignore_index=ignored)

    def ours(x, weight):
        return ops.linear_cross_entropy(x, weight, targets, ignored, reduction)

    upstream = [draw(*([N] if reduction == "none" else [])).to(kind)]

    def bits(x, weight):
        return narrow(x) and linear_kernels.takes(weight, None)

    check(guards, "linear_cross_entropy", ours, theirs, tensors, layouts, upstream, mask, n, bits)


@given(few, sizes, sizes, dtypes, seeds, many_layouts, masks, threads, probabilities)
def test_dropout(guards, B, T, D, dtype, seed, layouts, mask, n, p):
    guards.clear()
    draw = numbers(seed)
    tensors, upstream = [draw(B, T, D).to(dtype)], [draw(B, T, D).to(dtype)]
    keep = kept(seed, p, B, T, D) if B * T * D else torch.ones(B, T, D).double()

    def theirs(x):
        return x * keep.to(x.dtype)

    ours = seeded(seed, lambda x: ops.dropout(x, p))
    check(guards, "dropout", ours, theirs, tensors, layouts, upstream, mask, n)


@given(
    few, sizes, widths, st.sampled_from([32, 64, 96, 192]), seeds, many_layouts, masks, threads,
    st.sampled_from(KINDS), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(),
)  # fmt: skip
def test_quantized_linear(guards, B, T, N, K, seed, layouts, mask, n, kind, dtype, biased):
    """Against float64 and the sum of the factors' roundings, as in tests/test_quantized_linear.py;
    gradients by the error rule, over the weight that is stored.
    """
    guards.clear()
    precision, group = kind
    draw, dynamic = numbers(seed), precision == "int8-dynamic"
    stored = quantize_weight(draw(N, K if K % group == 0 else 64), precision, group)
    K = 2 * stored.values.shape[1] if precision == "int4" else stored.values.shape[1]
    weight = type(stored)(*(guards.place(t) for t in stored))
    tensors = [draw(B, T, K), *([draw(N)] if biased else []), draw(B, T, N)]
    *tensors, upstream = (
        guards.place(t.to(dtype), layout) for t, layout in zip(tensors, layouts, strict=False)
    )
    full = dequantize(stored, torch.float64)
    wide = tensors[0].double()
    tie = torch.zeros_like(wide)
    if dynamic:
        scale = wide.abs().amax(-1, keepdim=True) / 127
        steps = wide / scale.where(scale > 0, 1)
        # In float32 a number half-way between two steps may go either way.
        tie = ((steps - steps.floor() - 0.5).abs() < 1e-4) * scale
        wide = steps.round() * scale
    exact = F.linear(wide, full, *(t.double() for t in tensors[1:]))
    # In 4 bits a weight is a sum of two terms.
    terms = full.abs()
    if precision == "int4":
        terms = dequantize(stored._replace(minimum=stored.minimum.abs()), torch.float64)
    either = F.linear(tie, full.abs())
    size = F.linear(wide.abs(), terms, *(t.double().abs() for t in tensors[1:]))
    rule = Rule(
        lambda x, *bias: F.linear(x, full.to(x.dtype), *bias),
        tensors, [upstream], 1,
    )  # fmt: skip

    def ours(x, bias=None):
        return ops.quantized_linear(x, weight, bias, dynamic)

    for isa in cpu.isas():
        pairs = 2.0**-8 if isa == PAIRS and not dynamic and dtype is torch.float32 else 0
        allowed = 4 * torch.finfo(dtype).eps + (127e-6 if dynamic else 0) + pairs
        with cpu.use_isa(isa):
            for wanted in ([], [True] * len(tensors), [bool(mask & 1), bool(mask & 2)]):
                label, found = f"quantized_linear, {kind} on {isa}, gradients {wanted}", []
                for count in (1, n):
                    with thread_count(count):
                        found.append(call(ours, tensors, wanted[: len(tensors)], [upstream]))
                    tried.count("calls of quantized_linear")
                    guards.check(f"{label}, {count} threads")
                (_, y), *gradients = found[0]
                assert y.dtype is dtype, label
                assert ((y.double() - exact).abs() <= size * allowed + either).all(), label
                rule.check(gradients, label)
                if dtype is torch.float32 and linear_kernels.takes(
                    weight, *(tensors[1:] or [None])
                ):
                    same_bits(found[0][:1], found[1][:1], label)
