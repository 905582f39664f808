import re

import pytest
import torch
from torch.nn import functional as F

from fastgpt.triton import launch_table
from fastgpt.triton.linear import linear, linear_tma_kernel
from fastgpt.triton.linear_rows import linear_rows_kernel
from on_triton.support import gpu, interpreter
from on_triton.support.cases import DTYPE_IDS, DTYPES, HALF, MODES, Case, empty
from on_triton.support.compare import check

pytestmark = pytest.mark.usefixtures("interpreted")

HOPPER = launch_table.Device("sm_90", 2)


def _inputs(rows, width, depth, dtype, padded):
    shape = rows if isinstance(rows, tuple) else (rows,)
    x, weight = torch.randn(*shape, depth), torch.randn(width, depth) / max(depth, 1) ** 0.5
    return [padded(t.to(dtype)) for t in (x, weight, torch.randn(width))]


def _torch(gelu):
    def f(x, weight, bias=None):
        pre = F.linear(x, weight, bias)
        return (F.gelu(pre, approximate="tanh") if gelu else pre), pre

    return f


def _check(padded, x, weight, bias, gelu, with_pre=True):
    shape, dtype = (*x.shape[:-1], len(weight)), x.dtype
    y = padded.empty(*shape, dtype=dtype)
    pre = padded.empty(*shape, dtype=dtype) if with_pre else None
    linear(x, weight, bias, y, pre, gelu)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    upstream = [torch.ones_like(y)] * 2
    check((y, pre, *[None] * len(inputs)), _torch(gelu), inputs, upstream)
    return y


# A row, few, as many as one program takes, more; tiles' sizes, their neighbours, odd ones.
SHAPES = [
    (1, 130, 96),
    (2, 33, 1030),
    (3, 7, 5),
    (16, 48, 300),
    ((2, 5), 31, 64),
    (17, 65, 40),
    ((3, 50), 300, 136),
    (129, 70, 33),
]


@pytest.mark.parametrize("device", [interpreter.DEVICE, HOPPER], ids=lambda d: d.arch)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("rows", "width", "depth"), SHAPES)
def test_linear(padded, rows, width, depth, dtype, device):
    with interpreter.interpreted(device):
        _check(padded, *_inputs(rows, width, depth, dtype, padded), gelu=True)


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("depth", [512, 768, 1031, 3072])
def test_few_rows_of_any_depth(padded, rows, depth):
    """The error does not grow with a chain of sums as long as a row."""
    x, weight, bias = _inputs(rows, 37, depth, torch.float32, padded)
    _check(padded, x, weight, bias, gelu=False, with_pre=False)


def test_compiled_products_of_few_rows_start_at_zero():
    """The interpreter cannot show it: compilers turn `acc += dot` into one chain of sums."""
    from on_triton.support.gpu import fake_gpu

    for arch in ("sm_80", "sm_90", "gfx942"):
        with fake_gpu(arch) as launches:
            _product(16, 768, 3072)(torch.float32)
        ir = launches[0].compiled.asm["ttir"]
        zeros = re.findall(r"(%\w+) = arith\.constant dense<0\.0", ir)
        starts = re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", ir)
        assert starts
        assert set(starts) <= set(zeros)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_what_may_be_left_out(padded, rows):
    x, weight, bias = _inputs(rows, 24, 40, torch.float32, padded)
    for with_bias in (bias, None):
        for gelu in (False, True):
            _check(padded, x, weight, with_bias, gelu, with_pre=False)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=DTYPE_IDS[1:])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_weights_in_any_layout(padded, rows, dtype):
    x, weight, bias = _inputs(rows, 24, 40, dtype, padded)
    layouts = {
        "column by column": weight.t().contiguous().t(),
        "rows apart": padded(weight, past_row=3),
        "at an odd address": torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view(24, 40),
    }
    for device in (interpreter.DEVICE, HOPPER):
        with interpreter.interpreted(device):
            y = _check(padded, x, weight, bias, gelu=False)
            for name, other in layouts.items():
                again = torch.empty_like(y)
                linear(x, other, bias, again)
                assert torch.equal(again, y), name


def test_forms():
    """Which form an input takes: few rows, TMA where it can, else pointers."""
    from on_triton.support.gpu import fake_gpu

    cases = {
        ("sm_90", torch.bfloat16, 16, 64): linear_rows_kernel.__name__,
        ("sm_90", torch.bfloat16, 17, 64): linear_tma_kernel.__name__,
        ("sm_90", torch.bfloat16, 17, 60): "linear_kernel",
        ("sm_90", torch.float32, 17, 64): "linear_kernel",
        ("sm_80", torch.bfloat16, 17, 64): "linear_kernel",
    }
    for (arch, dtype, rows, depth), name in cases.items():
        with fake_gpu(arch) as launches:
            linear(empty(dtype, rows, depth), empty(dtype, 64, depth), None, empty(dtype, rows, 64))
        assert [launch.name for launch in launches] == [name]


def test_tf32_only_where_it_is_allowed():
    from on_triton.support.gpu import fake_gpu

    for allowed, name in ((False, "ieee"), (True, "tf32")):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        try:
            with fake_gpu("sm_90") as launches:
                x, weight, y = (empty(torch.float32, 64, 64) for _ in range(3))
                linear(x, weight, None, y)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        assert launches[0].arguments["PRECISION"] == name
        assert ("wgmma" in launches[0].compiled.asm["ptx"]) == (name == "tf32")


def test_empty(padded):
    for rows, width, depth in ((0, 8, 4), (20, 0, 4), (3, 0, 4)):
        x, weight, bias = _inputs(rows, width, depth, torch.float32, padded)
        linear(x, weight, bias, torch.empty(rows, width), gelu=True)
    for rows in (1, 9, 20):
        x, weight, bias = _inputs(rows, 8, 0, torch.float32, padded)
        y = padded.empty(rows, 8)
        linear(x, weight, bias, y)
        assert torch.equal(y, bias.expand(rows, 8))


def _product(rows, width, depth, stride=None, gelu=True):
    def run(dtype):
        x, bias, y = empty(dtype, rows, depth), empty(dtype, width), empty(dtype, rows, width)
        weight = empty(dtype, width, depth)
        if stride is not None:
            weight = empty(dtype, depth * width * 2).as_strided((width, depth), stride)
        if gelu:
            linear(x, weight, bias, y, y, gelu=True)
        else:
            linear(x, weight, None, y)

    return run


TMA = ("sm_90", "sm_100")
POINTERS = tuple(arch for arch in gpu.ARCHS if arch not in TMA)
CASES = {
    "pointers": Case(
        _product(4096, 3072, 768), matrix=("linear_kernel",), modes=HALF, archs=POINTERS
    ),
    "tma": Case(
        _product(4096, 3072, 768),
        matrix=("linear_tma_kernel",),
        wide=("linear_tma_kernel",),
        modes=HALF,
        archs=TMA,
    ),
    "tma, nothing fused": Case(
        _product(4096, 2304, 768, gelu=False),
        matrix=("linear_tma_kernel",),
        sample=HALF,
        sample_archs=("sm_90",),
        modes=HALF,
        archs=TMA,
    ),
    "head": Case(
        _product(4096, 50257, 768, gelu=False),
        matrix=("linear_tma_kernel",),
        modes=HALF,
        archs=TMA,
    ),
    "column by column": Case(
        _product(4096, 3072, 768, stride=(1, 3072)),
        matrix=("linear_kernel",),
        wide=("linear_kernel",),
        modes=tuple(MODES),
    ),
    # A weight whose rows TMA cannot take.
    "odd rows": Case(
        _product(4096, 3072, 768, stride=(769, 1)),
        matrix=("linear_kernel",),
        sample_archs=("sm_90",),
        modes=tuple(MODES),
    ),
    "float32": Case(
        _product(4096, 3072, 768),
        wide=("linear_kernel",),
        sample=("tf32", "float32"),
        modes=("tf32", "float32"),
    ),
    "row": Case(
        _product(1, 3072, 768), wide=("linear_rows_kernel",), sample=("bfloat16", "float32")
    ),
    "four rows": Case(
        _product(4, 3072, 768), wide=("linear_rows_kernel",), sample_archs=("sm_90",)
    ),
    "rows": Case(
        _product(16, 768, 3072),
        wide=("linear_rows_kernel",),
        sample=("bfloat16", "float32"),
        modes=tuple(MODES),
    ),
}
