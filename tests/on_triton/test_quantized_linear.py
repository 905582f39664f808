import pytest
import torch
from helpers import assert_as_exact
from torch.nn import functional as F

from fastgpt.quantized_weight import (
    Int4Weight,
    Int8Weight,
    dequantize,
    empty_weight,
    quantize_weight,
)
from fastgpt.triton.quantized_linear import quantized_linear, takes
from on_triton.support.cases import DTYPE_IDS, DTYPES, MODES, Case, empty
from on_triton.support.gpu import fake_gpu

pytestmark = pytest.mark.usefixtures("interpreted")
KINDS = pytest.mark.parametrize(
    ("precision", "group"), [("int8", 32), ("int4", 32), ("int4", 64)], ids=str
)


def _stored(n_out, n_in, precision, group, padded):
    spread = 0.5 + torch.rand(n_out, 1)
    weight = quantize_weight(torch.randn(n_out, n_in) * spread, precision, group)
    return type(weight)(*map(padded, weight))


def _check(padded, weight, x, bias):
    y = padded.empty(*x.shape[:-1], len(weight.values), dtype=x.dtype)
    quantized_linear(x, weight, bias, y)
    exact, theirs = (
        F.linear(x.to(d), dequantize(weight, d), None if bias is None else bias.to(d))
        for d in (torch.float64, x.dtype)
    )
    assert_as_exact(y, theirs, exact)


# A row, few, as many as one program takes; rows of W inside and across a program's; less than a
# block of each, a block and more.
SHAPES = [(1, 130, 64), (1, 37, 1088), (2, 33, 2112), (3, 70, 192), (5, 48, 320), ((2, 8), 31, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("rows", "n_out", "n_in"), SHAPES)
@KINDS
def test_against_float64(padded, rows, n_out, n_in, dtype, precision, group):
    rows = rows if isinstance(rows, tuple) else (rows,)
    weight = _stored(n_out, n_in, precision, group, padded)
    x, bias = (padded(torch.randn(*shape).to(dtype)) for shape in ((*rows, n_in), (n_out,)))
    _check(padded, weight, x, bias)
    _check(padded, weight, x, None)


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("n_in", [512, 768, 3072])
@KINDS
def test_any_depth(padded, rows, n_in, precision, group):
    """The error does not grow with a chain of sums as long as a row."""
    weight = _stored(37, n_in, precision, group, padded)
    _check(padded, weight, padded(torch.randn(rows, n_in)), None)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("n_in", [1, 33, 1031])
def test_int8_of_any_width(padded, rows, n_in):
    weight = _stored(37, n_in, "int8", 32, padded)
    _check(padded, weight, padded(torch.randn(rows, n_in)), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("rows", [4, 16])
@KINDS
def test_every_value(padded, rows, dtype, precision, group):
    """The identity times a weight with each value of a byte is what dequantize says, to the bit."""
    every, n_in = torch.arange(256), 32 if precision == "int8" else group
    if precision == "int8":
        weight = Int8Weight((every - 127).clamp(max=127).to(torch.int8).view(8, 32), torch.rand(8))
    else:
        values = every.to(torch.uint8).view(-1, group // 2)
        scale, minimum = (torch.randn(len(values), 1).bfloat16() for _ in range(2))
        weight = Int4Weight(values, scale, minimum)
    weight = type(weight)(*map(padded, weight))
    for x, right in zip(
        torch.eye(n_in, dtype=dtype).split(rows),
        dequantize(weight, dtype).t().split(rows),
        strict=True,
    ):
        y = padded.empty(*right.shape, dtype=dtype)
        quantized_linear(x, weight, None, y)
        assert torch.equal(y, right)


@KINDS
def test_nan_stays_in_its_row(padded, precision, group):
    weight = _stored(5, 64, precision, group, padded)
    for rows in (2, 16):
        x, y = torch.randn(rows, 64), torch.empty(rows, 5)
        x[1, 3] = torch.nan
        quantized_linear(x, weight, None, y)
        assert y.isnan().nonzero()[:, 0].unique().tolist() == [1]
        assert y[1].isnan().all()


@KINDS
def test_empty(padded, precision, group):
    for rows, n_out, n_in in ((0, 8, 64), (3, 0, 64), (3, 8, 0), (16, 8, 0)):
        weight = empty_weight(precision, (n_out, n_in), group)
        for t in weight:
            t.fill_(1)
        bias, y = torch.randn(n_out), padded.empty(rows, n_out)
        quantized_linear(torch.randn(rows, n_in), weight, bias, y)
        if n_in == 0:
            assert torch.equal(y, bias.expand(rows, n_out))


@KINDS
def test_what_it_takes(precision, group):
    weight = quantize_weight(torch.randn(6, 128), precision, group)
    x, bias = torch.randn(4, 4, 128), torch.randn(6)
    assert takes(x, weight, bias)
    assert takes(x, weight, None)
    assert not takes(torch.randn(17, 128), weight, bias)
    assert not takes(x, weight, torch.randn(12)[::2])
    assert not takes(x, weight, torch.randn(5))
    assert not takes(x.to("meta"), weight, None)
    for i, t in enumerate(weight):
        apart = t.repeat_interleave(2, 0)[::2]
        assert not takes(x, type(weight)(*weight[:i], apart, *weight[i + 1 :]), None)


def _product(precision, rows, n_out, n_in, group=32, bias=True):
    def run(dtype):
        if precision == "int8":
            weight = Int8Weight(empty(torch.int8, n_out, n_in), empty(torch.float32, n_out))
        else:
            scale = empty(torch.bfloat16, n_out, n_in // group)
            weight = Int4Weight(empty(torch.uint8, n_out, n_in // 2), scale, scale)
        x, y = empty(dtype, rows, n_in), empty(dtype, rows, n_out)
        quantized_linear(x, weight, empty(dtype, n_out) if bias else None, y)

    return run


def test_grids():
    with fake_gpu("sm_90") as launches:
        _product("int8", 3, 3073, 768)(torch.bfloat16)
        _product("int4", 9, 3073, 768, group=64)(torch.bfloat16)
    assert [(launch.name, launch.grid) for launch in launches] == [
        ("int8_rows_kernel", (769,)),
        ("int4_rows_kernel", (193,)),
    ]
    assert launches[1].arguments["GROUP"] == 2


def test_a_new_number_of_rows_compiles_nothing_anew():
    with fake_gpu("sm_90") as launches:
        for precision in ("int8", "int4"):
            for rows in (5, 8, 15, 16):
                _product(precision, rows, 64, 64)(torch.bfloat16)
    assert len({id(launch.compiled) for launch in launches}) == 2


CASES = {
    f"{precision}, {name}": Case(
        _product(precision, *shape),
        wide=(f"{precision}_rows_kernel",),
        sample=("bfloat16", "float32"),
        modes=tuple(MODES),
    )
    for precision in ("int8", "int4")
    for name, shape in {
        "row": (1, 3072, 768),
        "four rows": (4, 768, 3072),
        "rows": (16, 3072, 768),
    }.items()
}
CASES["int4, groups of 64"] = Case(
    _product("int4", 1, 3072, 768, group=64), wide=("int4_rows_kernel",)
)
CASES["int8, head"] = Case(_product("int8", 1, 50257, 768, bias=False), wide=("int8_rows_kernel",))
