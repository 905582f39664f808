import pytest
import torch
from helpers import assert_as_exact, check_operation, opcheck
from torch.nn import functional as F

import fastgpt
from fastgpt import reference
from fastgpt.ops import bias_gelu, gelu


def _torch(x, bias=None):
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@pytest.mark.parametrize("n", [1, 4, 15, 16, 17, 1000, 70000])
def test_gelu(path, n):
    check_operation(gelu, _torch, [torch.randn(n) * 3], [torch.randn(n)])


@pytest.mark.parametrize("width", [1, 7, 64, 100, 3072])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_bias_gelu(path, rows, width):
    inputs = [torch.randn(rows, width) * 2, torch.randn(width)]
    check_operation(bias_gelu, _torch, inputs, [torch.randn(rows, width)])


def test_the_whole_range(path):
    x = torch.cat([torch.linspace(-30, 30, 200_001), torch.logspace(-38, 38, 1001)])
    x = torch.cat([x, -x])
    assert_as_exact(gelu(x), _torch(x), _torch(x.double()))
    inner = x[x.abs() < 4]
    error = (gelu(inner).double() - _torch(inner.double())).abs()
    torchs = (_torch(inner).double() - _torch(inner.double())).abs()
    assert error.max() <= 2 * torchs.max()


def test_special_values(path):
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e38, -1e38, 3.4e38, -3.4e38]
    x = torch.tensor(special * 5)
    exact = fastgpt.reference.gelu(x)
    torch.testing.assert_close(gelu(x), exact, equal_nan=True, atol=0, rtol=1e-6)


def test_in_place(path):
    x, bias = torch.randn(9, 33), torch.randn(33)
    y = bias_gelu(x, bias)
    into = torch.empty_like(x)
    assert bias_gelu(x, bias, out=into) is into
    assert torch.equal(into, y)
    assert bias_gelu(x, bias, out=x) is x
    assert torch.equal(x, y)


def test_bad_input(path):
    x, bias = torch.randn(4, 8), torch.randn(8)
    with pytest.raises(ValueError, match=r"\(7,\).*\(4, 8\)"):
        bias_gelu(x, bias[:7])
    with pytest.raises(ValueError, match=r"must be \[N\] for x \(\)"):
        bias_gelu(x[0, 0], bias[0])
    with pytest.raises(ValueError, match="out must be contiguous"):
        bias_gelu(x, bias, out=torch.empty(8, 4).t())
    with pytest.raises(RuntimeError, match="out is not for"):
        bias_gelu(x.requires_grad_(), bias, out=torch.empty(4, 8))


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), ()])
def test_empty_and_scalar(path, shape):
    x = torch.ones(shape, requires_grad=True)
    y = gelu(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_not_contiguous(path):
    x, bias = torch.randn(12, 20), torch.randn(20)
    y = bias_gelu(x, bias)
    torch.testing.assert_close(bias_gelu(x.t().contiguous().t(), bias), y, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(bias_gelu(x, bias[None].expand(2, 20).t()[:, 0]), y, atol=0, rtol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_repeats_give_the_same_bits(path, threads):
    x, bias, before = torch.randn(77, 1000), torch.randn(1000), torch.get_num_threads()
    y = bias_gelu(x, bias)
    try:
        torch.set_num_threads(threads)
        torch.testing.assert_close(bias_gelu(x, bias), y, atol=1e-6, rtol=1e-6)
        assert torch.equal(bias_gelu(x, bias), bias_gelu(x, bias))
    finally:
        torch.set_num_threads(before)


def test_registered_operation(path):
    x, bias = torch.randn(3, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    opcheck(torch.ops.fastgpt.bias_gelu.default, (x, bias))
    opcheck(torch.ops.fastgpt.bias_gelu.default, (x, None))


def test_double_backward(path):
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(gelu(x.float()).square().sum(), x, create_graph=True)
    (exact,) = torch.autograd.grad(_torch(x).square().sum(), x, create_graph=True)
    seconds = (torch.autograd.grad(g.square().sum(), x)[0] for g in (dx, exact))
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_are_the_books(path, dtype):
    x = torch.tensor([0, 1, 3, 7]).to(dtype)
    ours = fastgpt.GELU()(x)
    assert torch.equal(ours, reference.GELU()(x))
    assert ours.dtype is torch.float32
