import pytest
import torch
from torch.nn import functional as F

from fastgpt.triton.gelu import bias_gelu, bias_gelu_backward
from on_triton.support.cases import DTYPE_IDS, DTYPES, Case, empty
from on_triton.support.compare import check

pytestmark = pytest.mark.usefixtures("interpreted")


def _torch(x, bias):
    return F.gelu(x + bias, approximate="tanh")


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (29, 64), (5, 1030)], ids=str)
def test_bias_gelu(padded, shape, dtype):
    x, dy = (padded((torch.randn(shape) * 2).to(dtype)) for _ in range(2))
    bias = padded(torch.randn(shape[-1]).to(dtype))
    y, dx = (padded.empty(*shape, dtype=dtype) for _ in range(2))
    dbias = padded.empty(shape[-1], dtype=dtype)
    bias_gelu(x, bias, y)
    bias_gelu_backward(dy, x, bias, dx, dbias)
    check((y, dx, dbias), _torch, (x, bias), [dy])
    alone = padded.empty(*shape, dtype=dtype)
    bias_gelu_backward(dy, x, bias, alone)
    assert torch.equal(alone, dx)


@pytest.mark.parametrize("shape", [(), (6,), (3, 5)], ids=str)
def test_without_a_bias_and_in_place(padded, shape):
    x, dy = padded(torch.randn(shape)), padded(torch.randn(shape))
    kept, y = x.clone(), x.clone()
    bias_gelu(y, None, y)
    bias_gelu_backward(dy, x, None, x)
    check((y, x), lambda x: F.gelu(x, approximate="tanh"), (kept,), [dy])


def test_gradient_of_a_bias_already_added(padded):
    x, dy, bias = torch.randn(9, 33), torch.randn(9, 33), torch.randn(33)
    dx, dbias, again = padded.empty(9, 33), padded.empty(33), padded.empty(33)
    bias_gelu_backward(dy, x + bias, None, dx, dbias)
    bias_gelu_backward(dy, x, bias, dx, again)
    torch.testing.assert_close(dbias, again)


def test_the_whole_range(padded):
    x = torch.cat([torch.linspace(-30, 30, 20_001), torch.logspace(-38, 18, 501)])
    x = padded(torch.cat([x, -x]))
    y, dx = torch.empty_like(x), torch.empty_like(x)
    bias_gelu(x, None, y)
    bias_gelu_backward(torch.ones_like(x), x, None, dx)
    check((y, dx), lambda x: F.gelu(x, approximate="tanh"), (x,), [torch.ones_like(x)])
    special = torch.tensor([torch.nan, torch.inf, 3.4e38, -3.4e38])
    bias_gelu(special, None, special)
    assert special[0].isnan()
    assert special[1:].tolist() == [torch.inf, torch.tensor(3.4e38).item(), 0]


def test_no_rows(padded):
    x, bias, dbias = torch.empty(0, 8), torch.randn(8), padded.empty(8)
    bias_gelu(x, bias, x)
    bias_gelu_backward(x, x, bias, x, dbias)
    assert not dbias.any()


def _run(dtype):
    x, bias = empty(dtype, 4096, 3072), empty(dtype, 3072)
    bias_gelu(x, bias, x)
    bias_gelu_backward(x, x, bias, x, bias)


CASES = {
    "both": Case(
        _run,
        wide=("bias_gelu_fwd_kernel", "bias_gelu_bwd_kernel"),
        sample=("bfloat16", "float32"),
    )
}
