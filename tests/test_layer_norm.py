import pytest
import torch
from helpers import assert_as_exact, check_operation
from torch.nn import functional as F

import fastgpt
from fastgpt import reference
from fastgpt.ops import add_layer_norm, layer_norm

# Below, at and past each vector's length, then models' widths.
WIDTHS = [1, 3, 16, 17, 64, 96, 130, 768, 1600]


def _torch(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _torch_add(x, branch, weight, bias):
    total = x + branch
    return _torch(total, weight, bias), total


def _inputs(*shape):
    width = shape[-1]
    return torch.randn(shape) * 3 + 1, torch.randn(width), torch.randn(width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 7, 129])
def test_layer_norm(path, rows, width):
    inputs = _inputs(rows, width)
    check_operation(layer_norm, _torch, inputs, [torch.randn(rows, width)])


@pytest.mark.parametrize("width", WIDTHS)
def test_add_layer_norm(path, width):
    x, weight, bias = _inputs(2, 5, width)
    upstream = [torch.randn(2, 5, width) for _ in range(2)]
    check_operation(add_layer_norm, _torch_add, (x, torch.randn_like(x), weight, bias), upstream)


def test_a_large_mean_does_not_cancel(path):
    x, weight, bias = _inputs(4, 768)
    x = x + 1e4
    exact = _torch(x.double(), weight.double(), bias.double())
    assert_as_exact(layer_norm(x, weight, bias), _torch(x, weight, bias), exact)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_of_one_number_is_the_bias(path, width):
    """Its mean must not be off by the roundings of a sum, which 1 / sqrt(eps) would enlarge."""
    x, weight, bias = torch.randn(40, 1).expand(40, width), torch.ones(width), torch.randn(width)
    exact = _torch(x.double(), weight.double(), bias.double())
    y, total = add_layer_norm(x, x, weight, bias)
    assert_as_exact(layer_norm(x, weight, bias), _torch(x, weight, bias), exact)
    assert_as_exact(y, _torch(total, weight, bias), exact)


@pytest.mark.parametrize("rows", [3, 129, 3000])
@pytest.mark.parametrize("width", [1, 17, 64])
def test_the_biass_gradient_is_rounded_once(path, rows, width):
    """Also where large numbers cancel; infinity and NaN stay what their sum is."""
    if path == "reference":
        pytest.skip("PyTorch's own sum is rounded more often")
    x, weight, bias = torch.randn(rows, width), torch.randn(width), torch.zeros(width)
    upstream = torch.randn(rows, width)
    upstream[0] += 1e3
    upstream[-1] -= 1e3

    def gradient(upstream):
        leaf = bias.clone().requires_grad_()
        return torch.autograd.grad(layer_norm(x, weight, leaf), leaf, upstream)[0]

    exact = upstream.double().sum(0)
    torch.testing.assert_close(gradient(upstream).double(), exact, rtol=2**-24, atol=1e-7)
    for special in (torch.inf, -torch.inf, torch.nan):
        upstream[1, 0] = special
        assert torch.equal(gradient(upstream)[:1].isnan(), upstream[1, :1].isnan())
        assert not gradient(upstream)[0].isfinite()


def test_rows_are_normalised_and_shifts_of_a_row_do_not_matter(path):
    x = torch.randn(33, 96)
    one, zero = torch.ones(96), torch.zeros(96)
    y = layer_norm(x, one, zero)
    torch.testing.assert_close(y.mean(-1), torch.zeros(33), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.var(-1, unbiased=False), torch.ones(33), atol=1e-4, rtol=0)
    torch.testing.assert_close(layer_norm(x + 5, one, zero), y, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty(path, shape):
    x, weight, bias = (t.requires_grad_() for t in _inputs(*shape))
    y, total = add_layer_norm(x, x.detach(), weight, bias)
    assert y.shape == total.shape == shape
    assert layer_norm(x, weight, bias).shape == shape
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_not_contiguous(path):
    x, weight, bias = _inputs(6, 32)
    y = layer_norm(x, weight, bias)
    assert torch.equal(layer_norm(x.t().contiguous().t(), weight, bias), y)
    assert torch.equal(layer_norm(x, torch.stack([weight, bias], 1)[:, 0], bias), y)


def test_not_a_number_and_infinity_stay_in_their_rows(path):
    x, weight, bias = _inputs(3, 40)
    x[0, 3], x[1, 39] = torch.nan, torch.inf
    y = layer_norm(x, weight, bias)
    assert y[:2].isnan().all()
    assert y[2].isfinite().all()


def test_same_bits_again_and_results_are_not_overwritten(path):
    x, weight, bias = _inputs(64, 768)
    y = layer_norm(x, weight, bias)
    kept = y.clone()
    assert torch.equal(layer_norm(x, weight, bias), kept)
    layer_norm(x * 2 + 1, weight, bias)
    assert torch.equal(y, kept)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_do_not_change_the_result(path, threads):
    x, weight, bias = _inputs(300, 96)
    before, y = torch.get_num_threads(), layer_norm(x, weight, bias)
    try:
        torch.set_num_threads(threads)
        torch.testing.assert_close(layer_norm(x, weight, bias), y, atol=1e-6, rtol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_no_work_for_gradients_nobody_asked_for(path):
    x, weight, bias = _inputs(4, 16)
    branch = torch.randn_like(x).requires_grad_()
    y, total = add_layer_norm(x, branch, weight, bias)
    (y + total).sum().backward()
    assert x.grad is weight.grad is bias.grad is None
    leaf = branch.detach().clone().requires_grad_()
    sum(_torch_add(x, leaf, weight, bias)).sum().backward()
    torch.testing.assert_close(branch.grad, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "cols"), [(3, 17), (130, 96)])
def test_narrow_dtypes(path, rows, cols, dtype):
    inputs = [t.to(dtype) for t in _inputs(rows, cols)]
    check_operation(layer_norm, _torch, inputs, [torch.randn(rows, cols).to(dtype)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cols", [1, 17, 96])
def test_a_narrow_sum_is_rounded_before_it_is_normalised(path, cols, dtype):
    """Else the statistics would not be those of what backward reads."""
    x, weight, bias = (t.to(dtype) for t in _inputs(130, cols))
    inputs, upstream = (x, x.roll(1, 0), weight, bias), [torch.randn(130, cols).to(dtype)] * 2
    check_operation(add_layer_norm, _torch_add, inputs, upstream)


def test_float64_runs_on_pytorch():
    dtype = torch.float64
    x, weight, bias = (t.to(dtype) for t in _inputs(4, 64))
    fastgpt.dispatch._say.cache_clear()
    if fastgpt.backends()["cpu"].available:
        with pytest.warns(fastgpt.BackendWarning, match=str(dtype).split(".")[1]):
            y = layer_norm(x, weight, bias)
        with fastgpt.use_backend("cpu"), pytest.raises(fastgpt.BackendError, match="float32"):
            layer_norm(x, weight, bias)
        assert torch.equal(y, _torch(x, weight, bias))


def test_mixed_dtypes_promote_as_in_the_book():
    x, weight, bias = _inputs(4, 64)
    with fastgpt.use_backend("reference"):
        y = layer_norm(x.bfloat16(), weight, bias)
    assert y.dtype == torch.float32
    assert torch.equal(y, fastgpt.reference.layer_norm(x.bfloat16(), weight, bias))


def test_bad_shapes(path):
    x, weight, bias = _inputs(4, 64)
    with pytest.raises(ValueError, match=r"\(63,\)"):
        layer_norm(x, weight[:63], bias)
    with pytest.raises(ValueError, match=r"\(4, 1\).*\(4, 64\)"):
        add_layer_norm(x, x[:, :1], weight, bias)
    for f, tensors in ((layer_norm, (bias,)), (add_layer_norm, (bias, bias))):
        with pytest.raises(ValueError, match=r"must be \[D\] for x \(\)"):
            f(*(t[0] for t in tensors), bias[0], bias[0])


def test_double_backward(path):
    tensors = [t.double().requires_grad_() for t in _inputs(2, 5)]
    with fastgpt.use_backend("reference"):
        assert torch.autograd.gradgradcheck(layer_norm, tensors)
    x, weight, bias = (t.float() for t in tensors)
    (dx,) = torch.autograd.grad(layer_norm(x, weight, bias).square().sum(), x, create_graph=True)
    (exact,) = torch.autograd.grad(_torch(*tensors).square().sum(), tensors[0], create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), tensors[0])
    (exact_second,) = torch.autograd.grad(exact.square().sum(), tensors[0])
    torch.testing.assert_close(second, exact_second, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("width", "shape"), [(5, (2, 1)), (1, (2, 5)), (5, (3, 2, 1))])
def test_one_wide_is_expanded_as_the_books(path, width, shape):
    ours, book = fastgpt.LayerNorm(width), reference.LayerNorm(width)
    with torch.no_grad():
        ours.scale.copy_(torch.randn(width))
        ours.shift.copy_(torch.randn(width))
    book.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    assert torch.equal(ours(x), book(x))
