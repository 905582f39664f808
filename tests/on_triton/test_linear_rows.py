import math

import pytest
import torch
from torch.nn import functional as F

from fastgpt.triton.linear_rows import linear_rows
from on_triton.support import gpu
from on_triton.support.cases import DTYPE_IDS, DTYPES, MODES, Case, empty
from on_triton.support.compare import check

pytestmark = pytest.mark.usefixtures("interpreted")
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
ROWS = pytest.mark.parametrize("rows", [1, 3, 16])
EPS = 1e-5


def _by_column(weight):
    return weight.t().contiguous().t()


def _weights(width, depth, dtype, padded):
    weight = torch.randn(width, depth) / depth**0.5
    return [padded(t.to(dtype)) for t in (weight, torch.randn(width))]


@DTYPE
@ROWS
@pytest.mark.parametrize("depth", [31, 768, 1601])
def test_a_norm_in_front_and_gelu_behind(padded, rows, depth, dtype):
    """Rows far from zero, so that a variance of one pass would cancel."""
    spread = 10.0 ** torch.randint(-2, 3, (rows, 1))
    x = padded((torch.randn(rows, depth) * spread + 8 * spread).to(dtype))
    scale, shift = (padded((1 + torch.randn(depth)).to(dtype)) for _ in range(2))
    weight, bias = _weights(70, depth, dtype, padded)
    y = padded.empty(rows, 70, dtype=dtype)
    linear_rows(x, weight, bias, y, gelu=True, norm=(scale, shift, EPS))

    def f(x, scale, shift, weight, bias):
        h = F.layer_norm(x, x.shape[1:], scale, shift, EPS)
        return (F.gelu(F.linear(h, weight, bias), approximate="tanh"),)

    inputs = (x, scale, shift, weight, bias)
    check((y, *[None] * 5), f, inputs, [torch.ones_like(y)])
    again = torch.empty_like(y)
    linear_rows(x, _by_column(weight), bias, again, gelu=True, norm=(scale, shift, EPS))
    torch.testing.assert_close(again, y)


@DTYPE
@ROWS
@pytest.mark.parametrize(("heads", "head_dim", "splits"), [(3, 16, 1), (2, 33, 2), (12, 64, 8)])
def test_splits_are_joined_and_a_residual_added(padded, rows, heads, head_dim, splits, dtype):
    depth = heads * head_dim
    part = torch.randn(rows, splits, heads, head_dim)
    lse = 5 * torch.randn(rows, heads, splits)
    if splits > 1:  # one saw nothing
        lse[:, 1, -1] = -torch.inf
    weight, bias = _weights(40, depth, dtype, padded)
    residual = torch.randn(rows, 40)
    y = padded(residual)
    linear_rows(padded(part), weight, bias, y, lse=padded(lse), residual=y)

    def f(weight, bias):
        wide = torch.promote_types(weight.dtype, torch.float32)
        shares = torch.softmax(lse.to(wide) * math.log(2), dim=-1).mT[..., None]
        joined = (part * shares).sum(1).flatten(1).to(weight.dtype)
        return (F.linear(joined, weight, bias).to(wide) + residual,)

    check((y, None, None), f, (weight, bias), [torch.ones_like(y)])


def test_nan_stays_in_its_row(padded):
    for rows in (2, 16):
        x = torch.randn(rows, 24)
        x[1, 3] = torch.nan
        weight, bias = _weights(5, 24, torch.float32, padded)
        y = padded.empty(rows, 5)
        linear_rows(x, weight, bias, y, norm=(bias.new_ones(24), bias.new_ones(24), EPS))
        assert y.isnan().nonzero()[:, 0].unique().tolist() == [1]


def _product(rows, width, depth, by_column=False, splits=None, norm=False):
    """With a norm in front and GELU behind; or so many splits to join, and a residual."""

    def run(dtype):
        weight, bias, y = empty(dtype, width, depth), empty(dtype, width), empty(dtype, rows, width)
        if by_column:
            weight = empty(dtype, depth, width).t()
        options = {}
        x = empty(torch.float32 if norm else dtype, rows, depth)
        if norm:
            options = {"gelu": True, "norm": (empty(dtype, depth), empty(dtype, depth), EPS)}
        if splits is not None:
            x = empty(torch.float32, rows, splits, depth)
            options["lse"] = empty(torch.float32, rows, depth // 64, splits)
            y = options["residual"] = empty(torch.float32, rows, width)
        linear_rows(x, weight, bias, y, **options)

    return run


@DTYPE
@pytest.mark.parametrize("rows", [1, 2, 4, 16])
def test_tiles_hold_whole_sectors(rows, dtype):
    """In either layout a program reads 32 bytes or more at consecutive addresses."""
    for by_column, along in ((False, "BLOCK_K"), (True, "BLOCK_N")):
        with gpu.fake_gpu("sm_90") as launches:
            _product(rows, 768, 768, by_column)(dtype)
        assert launches[0].arguments[along] * dtype.itemsize >= 32


WIDE = {
    "wide": ("linear_rows_kernel",),
    "sample": ("bfloat16", "float32"),
    "modes": tuple(MODES),
}
CASES = {
    "norm": Case(_product(1, 3072, 768, norm=True), **WIDE),
    "norm, rows": Case(_product(16, 3072, 768, norm=True), **WIDE),
    "norm, four rows of XL": Case(_product(4, 6400, 1600, norm=True), wide=WIDE["wide"]),
    "join": Case(_product(1, 768, 768, splits=8), **WIDE),
    "join, four rows": Case(_product(4, 768, 768, splits=6), wide=WIDE["wide"]),
    "join, rows": Case(_product(16, 768, 768, splits=2), **WIDE),
    "column by column": Case(_product(1, 768, 3072, True), **WIDE),
    "column by column, norm, rows": Case(_product(16, 3072, 768, True, norm=True), **WIDE),
    "column by column, join, four rows": Case(_product(4, 768, 768, True, 6), **WIDE),
}
