import pytest
import torch
from helpers import check_operation
from torch.nn import functional as F

import fastgpt
from fastgpt.ops import linear, linear_gelu

# Rows on either side of where the kernel changes its way, and of its tiles and blocks.
ROWS = [1, 5, 16, 17, 24, 25, 65, 129]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 48), (17, 130), (800, 49), (5, 1), (1, 7)])
def test_linear(path, rows, n_in, n_out):
    inputs = [torch.randn(rows, n_in), torch.randn(n_out, n_in), torch.randn(n_out)]
    check_operation(linear, F.linear, inputs, [torch.randn(rows, n_out)])


def column_major(t):
    return t.mT.contiguous().mT


def padded(t):
    return F.pad(t, (0, 3))[:, : t.shape[1]]


def strided(t):
    return t.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]


@pytest.mark.parametrize("layout", [column_major, padded, strided])
@pytest.mark.parametrize("rows", [3, 70])
def test_layouts_of_the_weight(path, layout, rows):
    """As the book's loader and views of packed tensors leave them; the gradient fits the weight."""
    weight = torch.randn(40, 33)
    x = torch.randn(2, rows, 33, requires_grad=True)
    upstream = torch.randn(2, rows, 40)
    found = []
    for make in (layout, torch.clone):
        w = make(weight).requires_grad_()
        y = linear(x, w)
        found.append([y, *torch.autograd.grad(y, [x, w], upstream)])
        leaf = w.detach().requires_grad_()
        linear(x, leaf).backward(upstream)
        assert leaf.grad.stride() == torch.empty_like(leaf).stride()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_many_rows_are_summed_in_parts(path):
    """More rows than a packed block is deep, for the weight's gradient."""
    x, w = torch.randn(1700, 24), torch.randn(50, 24)
    check_operation(linear, F.linear, [x, w], [torch.randn(1700, 50)])


@pytest.mark.parametrize("rows", [33, 300])
@pytest.mark.parametrize("layout", [torch.clone, column_major])
@pytest.mark.parametrize(("n_in", "n_out"), [(256, 192), (300, 800)])
def test_products_that_a_blas_would_take(path, layout, rows, n_in, n_out):
    tensors = [torch.randn(rows, n_in), layout(torch.randn(n_out, n_in)), torch.randn(n_out)]
    for f, g in ((linear, F.linear), (linear_gelu, _gelu_of_linear)):
        check_operation(f, g, tensors, [torch.randn(rows, n_out)])


def _gelu_of_linear(*tensors):
    return F.gelu(F.linear(*tensors), approximate="tanh")


@pytest.mark.parametrize("isa", fastgpt.cpu.isas())
@pytest.mark.parametrize("layout", [torch.clone, column_major])
@pytest.mark.parametrize("rows", [65, 100, 257, 301])
@torch.no_grad()
def test_a_row_has_the_same_bits_among_any_number_of_rows(isa, layout, rows):
    x, weight = torch.randn(600, 300), layout(torch.randn(800, 300))
    with fastgpt.use_backend("cpu"), fastgpt.cpu.use_isa(isa):
        y = linear(x, weight)
        assert torch.equal(linear(x[:rows], weight), y[:rows])
        assert torch.equal(linear(x[-rows:], weight), y[-rows:])


@pytest.mark.parametrize("isa", fastgpt.cpu.isas())
@pytest.mark.parametrize("rows", [3, 24, 129, 3000])
def test_the_biass_gradient_is_rounded_once(isa, rows):
    """Also where large numbers cancel; infinity and NaN stay what their sum is."""
    bias, upstream = torch.zeros(100, requires_grad=True), torch.randn(rows, 100)
    upstream[0, 50:] += 1e3
    upstream[-1, 50:] -= 1e3
    with fastgpt.use_backend("cpu"), fastgpt.cpu.use_isa(isa):

        def gradient(upstream):
            y = linear(torch.ones(rows, 4), torch.ones(100, 4), bias)
            return torch.autograd.grad(y, bias, upstream)[0]

        exact = upstream.double().sum(0)
        torch.testing.assert_close(gradient(upstream).double(), exact, rtol=2**-24, atol=1e-7)
        upstream[1, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.inf])
        upstream[2, 3] = -torch.inf
        special = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.nan])
        torch.testing.assert_close(gradient(upstream)[:4], special, equal_nan=True)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_nothing_is_made_for_what_is_frozen(path, frozen):
    tensors = {"x": torch.randn(4, 6), "weight": torch.randn(5, 6), "bias": torch.randn(5)}
    for name, t in tensors.items():
        t.requires_grad_(name != frozen)
    y = linear(*tensors.values())
    y.sum().backward()
    assert tensors[frozen].grad is None
    assert all(t.grad is not None for name, t in tensors.items() if name != frozen)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_empty(path, shape):
    x, w = torch.randn(shape, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    linear(x, w).sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(w.grad, torch.zeros(5, 6))


def test_shapes_that_do_not_fit(path):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(3, 5), torch.randn(4, 6))


def _bias_in_front_of_gelu(shape):
    x, w, bias = torch.randn(3, 6), torch.randn(4, 6), None if shape is None else torch.randn(shape)
    if shape == (3,):
        with pytest.raises(RuntimeError, match="size"):
            linear_gelu(x, w, bias)
        return
    right = F.gelu(F.linear(x, w, bias), approximate="tanh")
    torch.testing.assert_close(linear_gelu(x, w, bias), right)


@pytest.mark.parametrize("shape", [(3,), (1, 4), (), None])
def test_a_bias_in_front_of_gelu_is_as_in_pytorch(path, shape):
    _bias_in_front_of_gelu(shape)


@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
@pytest.mark.parametrize("shape", [(3,), (1, 4), (), None])
def test_a_bias_in_front_of_gelu_is_as_in_pytorch_under_autocast(shape):
    with torch.autocast("cpu", torch.bfloat16):
        _bias_in_front_of_gelu(shape)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(path, threads):
    x, w = torch.randn(300, 96, requires_grad=True), torch.randn(700, 96, requires_grad=True)
    upstream, before, found = torch.randn(300, 700), torch.get_num_threads(), []
    try:
        for n in (2, threads):
            torch.set_num_threads(n)
            y = linear(x, w)
            found.append([y, *torch.autograd.grad(y, [x, w], upstream)])
    finally:
        torch.set_num_threads(before)
    if path != "reference":
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_second_derivative(path):
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    seconds = []
    for f in (linear, F.linear):
        grads = torch.autograd.grad(f(x, w).sin().sum(), (x, w), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w)))
    torch.testing.assert_close(*seconds, rtol=1e-5, atol=1e-4)
