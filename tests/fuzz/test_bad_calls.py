"""Random calls on what does not fit: an exception as the reference's, or its result."""

import contextlib

import torch
from hypothesis import given
from hypothesis import strategies as st

import fastgpt
from fastgpt import ops
from fastgpt.quantized_weight import quantize_weight
from fuzz import tried
from fuzz.cases import numbers, seeds
from fuzz.test_operations import guards as guards
from fuzz.test_operations import pytestmark as pytestmark

_CHANGES = {
    "nothing": lambda t: t,
    "no tensor": lambda t: None,
    "a list": lambda t: t.tolist(),
    "a number": lambda t: 3.5,
    "a string": lambda t: "tensor",
    "on meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t > 0,
    "int64": lambda t: t.long(),
    "uint8": lambda t: t.abs().to(torch.uint8),
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "float16": lambda t: t.half(),
    "a dimension more": lambda t: t[None],
    "a dimension less": lambda t: t[0] if t.dim() else t,
    "a row more": lambda t: torch.cat((t, t[:1])) if t.dim() else t,
    "a row less": lambda t: t[:-1] if t.dim() else t,
    "a column more": lambda t: torch.cat((t, t[..., :1]), -1) if t.dim() else t,
    "a column less": lambda t: t[..., :-1] if t.dim() else t,
    "no rows": lambda t: t[:0] if t.dim() else t,
    "no columns": lambda t: t[..., :0] if t.dim() else t,
    "turned": lambda t: t.mT if t.dim() > 1 else t,
    "of no dimension": lambda t: t.flatten()[0] if t.numel() else t,
}


changes = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(list(_CHANGES))), min_size=1, max_size=2
)


def _calls(draw, integers):
    """By operation the function, its tensors, and what else it takes with what may be wrong."""
    x, weight, bias = draw(2, 5, 16), draw(7, 16), draw(7)
    ids = integers(9, 2, 5)
    heads = [draw(2, 3, 5, 8) for _ in range(3)]
    wrong = {"dropout_p": [0.0, 0.5, -1, 2, float("nan"), "half", None]}
    int8 = quantize_weight(weight, "int8")
    return {
        "layer_norm": (ops.layer_norm, [x, draw(16), draw(16)], {}),
        "add_layer_norm": (ops.add_layer_norm, [x, x + 1, draw(16), draw(16)], wrong),
        "gelu": (ops.gelu, [x], {}),
        "bias_gelu": (ops.bias_gelu, [x, draw(16)], {}),
        "causal_attention": (
            ops.causal_attention, heads, wrong | {"scale": [None, 0.0, "much"]},
        ),
        "embedding": (
            ops.embedding, [ids, draw(9, 16), draw(6, 16)], wrong | {"past": [0, 1, 2, -1, "two"]},
        ),
        "linear": (ops.linear, [x, weight, bias], {}),
        "linear_gelu": (ops.linear_gelu, [x, weight, bias], {}),
        "linear_cross_entropy": (
            ops.linear_cross_entropy, [x, weight, integers(7, 2, 5)],
            {"reduction": ["mean", "sum", "none", "median", None], "ignore_index": [-100, 3, None]},
        ),
        "dropout": (lambda x, dropout_p=0.5: ops.dropout(x, dropout_p), [x], wrong),
        "quantized_linear": (
            lambda x, values, scale, bias, dynamic=False: ops.quantized_linear(
                x, type(int8)(values, scale), bias, dynamic
            ),
            [x, *int8, bias], {"dynamic": [False, True]},
        ),
    }  # fmt: skip


def _result(run):
    """What a call gives: its tensors, or the exception."""
    torch.default_generator.manual_seed(1)
    try:
        result = run()
    except Exception as error:
        return error
    return list(result) if isinstance(result, tuple) else [result]


@given(st.data(), seeds, changes, st.booleans())
def test_what_does_not_fit(guards, data, seed, changes, learns):
    guards.clear()
    generator = torch.Generator().manual_seed(seed)

    def integers(below, *shape):
        return torch.randint(below, shape, generator=generator)

    calls = _calls(numbers(seed), integers)
    name = data.draw(st.sampled_from(sorted(calls)))
    f, tensors, more = calls[name]
    for at, change in changes:
        at %= len(tensors)
        if isinstance(tensors[at], torch.Tensor):
            with contextlib.suppress(RuntimeError, IndexError):  # of what has changed before
                tensors[at] = _CHANGES[change](tensors[at])
    options = {key: data.draw(st.sampled_from(values)) for key, values in more.items()}
    if learns:
        tensors = [_learning(t) for t in tensors]
    strange = "much" in options.values() or not all(isinstance(t, torch.Tensor) for t in tensors)
    label = f"{name} with {changes}, {options}"
    found = {}
    for backend in ("reference", "auto"):
        with fastgpt.use_backend(backend):
            found[backend] = _result(lambda: f(*tensors, **options))
        tried.count("bad calls")
    theirs, ours = found["reference"], found["auto"]
    if isinstance(theirs, Exception) or isinstance(ours, Exception):
        assert str(ours), f"{label}: {type(ours).__name__} without a word"
        # Of several mistakes another may be named, if one of them is no tensor.
        alike = strange or type(ours) is type(theirs)
        alike &= isinstance(theirs, Exception) and isinstance(ours, Exception)
        assert alike, f"{label}: {ours!r} for {theirs!r}"
        return
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(a, torch.Tensor):  # what dropout leaves alone
            assert a is b, label
            continue
        assert a.shape == b.shape, label
        assert a.dtype == b.dtype, label
        assert a.device == b.device, label
        if options.get("dropout_p", 0.0) == 0.0 and name != "dropout" and not a.is_meta:
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05, equal_nan=True, msg=label)
    guards.check(label)


def _learning(t):
    plain = isinstance(t, torch.Tensor) and t.is_floating_point()
    return t.detach().requires_grad_() if plain else t
