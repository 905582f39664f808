import philox
import pytest
import torch
from torch.nn import functional as F

from fastgpt.triton.layer_norm import MAX_WIDTH, layer_norm, layer_norm_backward
from on_triton.support.cases import DTYPE_IDS, DTYPES, Case, empty
from on_triton.support.compare import check

pytestmark = pytest.mark.usefixtures("interpreted")

EPS = 1e-5
# Below, at and past a power of two, then models' widths.
SHAPES = [(1, 1), (3, 17), (2, 9, 64), (33, 96), (5, 768), (7, 1600)]


def _torch(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _inputs(shape, dtype, padded):
    x, weight, bias = torch.randn(shape) * 3 + 1, torch.randn(shape[-1]), torch.randn(shape[-1])
    return [padded(t.to(dtype)) for t in (x, weight, bias)]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(padded, shape, dtype):
    x, weight, bias = _inputs(shape, dtype, padded)
    dy = padded(torch.randn(shape).to(dtype))
    y, dx = (padded.empty(*shape, dtype=dtype) for _ in range(2))
    dweight, dbias = (padded.empty(shape[-1], dtype=dtype) for _ in range(2))
    mean, rstd = (padded.empty(*shape[:-1]) for _ in range(2))
    layer_norm(x, weight, bias, EPS, y, mean, rstd)
    layer_norm_backward(dy, x, weight, mean, rstd, dx, dweight, dbias)
    check((y, dx, dweight, dbias), _torch, (x, weight, bias), [dy])
    torch.testing.assert_close(mean, x.double().mean(-1).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_residual_add_and_dropout(padded, shape, dtype, p):
    x, weight, bias = _inputs(shape, dtype, padded)
    branch, dy, dtotal = (padded(torch.randn(shape).to(dtype)) for _ in range(3))
    scale = philox.keep(5, shape, p) if p else torch.ones(shape, dtype=torch.float64)
    y, total, dx, dbranch = (padded.empty(*shape, dtype=dtype) for _ in range(4))
    dweight, dbias = (padded.empty(shape[-1], dtype=dtype) for _ in range(2))
    mean, rstd = (padded.empty(*shape[:-1]) for _ in range(2))
    layer_norm(x, weight, bias, EPS, y, mean, rstd, branch, total, p, 5)
    into = dbranch if p else None
    layer_norm_backward(dy, total, weight, mean, rstd, dx, dweight, dbias, dtotal, into, p, 5)

    def torchs(x, branch, weight, bias):
        total = x + (branch * scale).to(x.dtype)
        return _torch(total, weight, bias), total

    results = (y, total, dx, dbranch if p else dx, dweight, dbias)
    check(results, torchs, (x, branch, weight, bias), [dy, dtotal])
    if p:
        assert torch.equal(dbranch == 0, scale == 0)


def test_only_what_is_wanted(padded):
    x, weight, bias = _inputs((9, 40), torch.float32, padded)
    dy = padded(torch.randn(9, 40))
    y, mean, rstd = padded.empty(9, 40), padded.empty(9), padded.empty(9)
    layer_norm(x, weight, bias, EPS, y)
    layer_norm(x, weight, bias, EPS, y, mean, rstd)
    wanted = [padded.empty(9, 40), padded.empty(40), padded.empty(40)]
    layer_norm_backward(dy, x, weight, mean, rstd, *wanted)
    for i, whole in enumerate(wanted):
        alone = [padded.empty(*whole.shape) if i == j else None for j in range(3)]
        layer_norm_backward(dy, x, weight, mean, rstd, *alone)
        assert torch.equal(alone[i], whole)
    layer_norm_backward(dy, x, weight, mean, rstd, dy)  # in place
    assert torch.equal(dy, wanted[0])


def test_float32_parameters_under_half_activations(padded):
    x, weight, bias = _inputs((6, 64), torch.float32, padded)
    y = padded.empty(6, 64, dtype=torch.bfloat16)
    layer_norm(x.bfloat16(), weight, bias, EPS, y)
    exact = _torch(x.bfloat16().double(), weight.double(), bias.double())
    torch.testing.assert_close(y, exact.bfloat16(), rtol=2**-7, atol=1e-5)


def test_a_large_mean_does_not_cancel(padded):
    x, weight, bias = _inputs((4, 768), torch.float32, padded)
    y = padded.empty(4, 768)
    layer_norm(x.add_(1e4), weight, bias, EPS, y)
    check((y, None, None, None), _torch, (x, weight, bias), [y])


def test_not_a_number_and_infinity_stay_in_their_rows(padded):
    x, weight, bias = _inputs((3, 40), torch.float32, padded)
    x[0, 3], x[1, 39] = torch.nan, torch.inf
    y = padded.empty(3, 40)
    layer_norm(x, weight, bias, EPS, y)
    assert y[:2].isnan().all()
    assert y[2].isfinite().all()


def test_no_rows(padded):
    x, weight, bias = _inputs((0, 8), torch.float32, padded)
    stats, dweight, dbias = torch.empty(0), padded.empty(8), padded.empty(8)
    layer_norm(x, weight, bias, EPS, x, stats, stats)
    layer_norm_backward(x, x, weight, stats, stats, x, dweight, dbias)
    assert not dweight.any()
    assert not dbias.any()


def _forward(width, p=0.0):
    def run(dtype):
        x, y, weight, stats = (
            empty(dtype, 4096, width),
            empty(dtype, 4096, width),
            empty(dtype, width),
            empty(torch.float32, 4096),
        )
        layer_norm(x, weight, weight, EPS, y, stats, stats, x, y, p, 12345)

    return Case(run, wide=("layer_norm_fwd_kernel",))


def _backward(width, p=0.0):
    def run(dtype):
        x, weight, stats = (
            empty(dtype, 4096, width),
            empty(dtype, width),
            empty(torch.float32, 4096),
        )
        dbranch = x if p else None
        layer_norm_backward(x, x, weight, stats, stats, x, weight, weight, x, dbranch, p, 12345)

    return Case(run, wide=("layer_norm_bwd_kernel", "sum_rows_kernel"))


def _under_autocast(dtype):
    """The residual stream float32, the branch and the norm, with their gradients, bfloat16."""
    x, y = empty(torch.float32, 4096, 768), empty(torch.bfloat16, 4096, 768)
    weight, stats = empty(torch.float32, 768), empty(torch.float32, 4096)
    layer_norm(x, weight, weight, EPS, y, stats, stats, y, x, 0.1, 12345)
    layer_norm_backward(y, x, weight, stats, stats, x, weight, weight, x, y, 0.1, 12345)


CASES = {
    "autocast": Case(
        _under_autocast,
        wide=("layer_norm_fwd_kernel", "layer_norm_bwd_kernel", "sum_rows_kernel"),
        sample=("float32",),
        modes=("float32",),
    ),
    "forward-64": _forward(64)._replace(sample_archs=("sm_90", "gfx942")),
    "backward-64": _backward(64)._replace(sample_archs=("sm_90", "gfx942")),
    "forward-4096": _forward(4096)._replace(sample_archs=("sm_90",)),
    "backward-4096": _backward(4096)._replace(sample_archs=("sm_90",)),
    "forward-768": _forward(768, p=0.1),
    "forward-1600": _forward(1600)._replace(sample=("float32", "float16")),
    "forward-widest": _forward(MAX_WIDTH)._replace(sample_archs=("sm_90",)),
    "backward-768": _backward(768, p=0.1),
    "backward-1600": _backward(1600)._replace(sample=("float32", "float16")),
    "backward-widest": _backward(MAX_WIDTH)._replace(sample_archs=("sm_90",)),
}
