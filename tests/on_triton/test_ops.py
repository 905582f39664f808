"""The operations of fastgpt.ops on interpreted kernels."""

import pytest
import torch
from helpers import check_operation, forward_backward, opcheck
from torch.nn import functional as F

import fastgpt
from fastgpt import ops, reference
from fastgpt.quantized_weight import PRECISIONS, dequantize, quantize_weight
from fastgpt.triton import vendor
from on_triton.support.cases import DTYPE_IDS, DTYPES

pytestmark = pytest.mark.usefixtures("dispatched")
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
BF16 = torch.bfloat16


def _randn(*shape, dtype):
    return torch.randn(shape).to(dtype)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched."""
    from triton.runtime.jit import KernelInterface

    names, launch = [], KernelInterface.__getitem__
    monkeypatch.setattr(
        KernelInterface, "__getitem__", lambda k, grid: names.append(k.__name__) or launch(k, grid)
    )
    return names


@DTYPE
def test_layer_norm(launches, dtype):
    x, weight, bias = (_randn(*shape, dtype=dtype) for shape in ((2, 5, 24), (24,), (24,)))
    x = x.transpose(0, 1)
    dy = torch.randn(5, 2, 24)
    check_operation(
        ops.layer_norm, lambda x, w, b: F.layer_norm(x, (24,), w, b), [x, weight, bias], [dy]
    )
    assert "layer_norm_bwd_kernel" in launches


@pytest.mark.parametrize(
    ("stream", "branch"), [*((d, d) for d in DTYPES), (torch.float32, BF16), (BF16, torch.float32)]
)
def test_add_layer_norm(launches, stream, branch):
    wide = torch.promote_types(stream, branch)
    inputs = [_randn(7, 24, dtype=d) for d in (stream, branch)]
    inputs += [_randn(24, dtype=wide) for _ in range(2)]
    upstream = [torch.randn(7, 24) for _ in range(2)]

    def theirs(x, branch, weight, bias):
        total = x + branch
        return F.layer_norm(total, (24,), weight, bias), total

    check_operation(ops.add_layer_norm, theirs, inputs, upstream)
    mine = forward_backward(ops.add_layer_norm, inputs, upstream)
    assert [t.dtype for t in mine] == [wide, wide, stream, branch, wide, wide]
    assert "layer_norm_bwd_kernel" in launches


@pytest.mark.parametrize("branch", [torch.float32, BF16])
def test_dropout_of_the_branch(branch):
    x, weight, bias = torch.randn(7, 24), torch.randn(24), torch.randn(24)
    branch = torch.randn(7, 24).to(branch).requires_grad_()
    torch.manual_seed(3)
    y, total = ops.add_layer_norm(x, branch, weight, bias, dropout_p=0.4)
    kept = (total - x) != 0
    assert 0.3 < kept.float().mean() < 0.9
    torch.testing.assert_close(total, x + branch.float() * kept / 0.6)
    torch.testing.assert_close(y, F.layer_norm(total, (24,), weight, bias))
    (grad,) = torch.autograd.grad(total.sum(), branch)
    assert grad.dtype == branch.dtype
    torch.testing.assert_close(grad.float(), kept / 0.6, atol=0.01, rtol=0.01)


@DTYPE
def test_gelu(launches, dtype):
    x, bias, dy = _randn(3, 20, dtype=dtype), _randn(20, dtype=dtype), torch.randn(3, 20)
    check_operation(ops.gelu, lambda x: F.gelu(x, approximate="tanh"), [x], [dy])
    theirs = lambda x, bias: F.gelu(x + bias, approximate="tanh")  # noqa: E731
    check_operation(ops.bias_gelu, theirs, [x, bias], [dy])
    assert launches.count("bias_gelu_bwd_kernel") == 2


@DTYPE
def test_embedding(launches, dtype):
    idx = torch.randint(0, 13, (2, 5), dtype=torch.int32)
    tok, pos = _randn(13, 20, dtype=dtype), _randn(8, 20, dtype=dtype)
    check_operation(
        lambda tok, pos: ops.embedding(idx, tok, pos, 2),
        lambda tok, pos: F.embedding(idx, tok) + pos[2:7],
        [tok, pos],
        [torch.randn(2, 5, 20)],
    )
    assert "token_bwd_kernel" in launches
    with pytest.raises(IndexError, match="token id 13 is outside the vocabulary of 13"):
        ops.embedding(idx + 13 - idx, tok, pos)


@DTYPE
@pytest.mark.parametrize(("T", "S", "D"), [(19, 19, 16), (3, 21, 24), (1, 9, 80)])
def test_causal_attention(launches, dtype, T, S, D):
    q, k, v = (_randn(2, n, 3, D, dtype=dtype).transpose(1, 2) for n in (T, S, S))

    def theirs(q, k, v):
        hidden = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
        return torch.softmax((q @ k.mT * D**-0.5).masked_fill(hidden, -torch.inf), -1) @ v

    check_operation(ops.causal_attention, theirs, [q, k, v], [torch.randn(2, 3, T, D)])
    assert "causal_attention_bwd_dkdv_kernel" in launches


def test_attention_dropout_repeats_in_backward():
    q, k = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    v = torch.eye(9, 16).expand(1, 2, 9, 16).clone().requires_grad_()
    torch.manual_seed(1)
    out = ops.causal_attention(q, k, v, dropout_p=0.5)
    weights = out[..., :9]  # with the identity for values
    (dv,) = torch.autograd.grad(out, v, torch.eye(9, 16).expand(1, 2, 9, 16))
    torch.testing.assert_close(dv[..., :9], weights.mT)
    assert (weights == 0).sum() > 2 * 36 + 10
    torch.manual_seed(1)
    assert torch.equal(ops.causal_attention(q, k, v, dropout_p=0.5), out)


def test_the_vendor_attends_where_the_table_says_so(launches):
    q = torch.randn(1, 2, 9, 16, requires_grad=True)
    torch.use_deterministic_algorithms(False)
    out = ops.causal_attention(q, q, q)
    assert launches == []
    torch.use_deterministic_algorithms(True)
    torch.testing.assert_close(out, ops.causal_attention(q, q, q))
    assert launches == ["causal_attention_fwd_kernel"]


@DTYPE
@pytest.mark.parametrize("rows", [3, 40])
def test_linear(launches, dtype, rows):
    inputs = [_randn(*shape, dtype=dtype) for shape in ((rows, 24), (20, 24), (20,))]
    check_operation(ops.linear, F.linear, inputs, [torch.randn(rows, 20)])
    assert launches == (["linear_rows_kernel"] if rows == 3 else [])


@DTYPE
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantized_linear(launches, dtype, rows, precision):
    """Few rows run on our kernels, with gradients too; many, and int8 by int8, on PyTorch's."""
    weight = quantize_weight(torch.randn(20, 64), precision)
    inputs = [_randn(*shape, dtype=dtype) for shape in ((rows, 64), (20,))]
    dynamic = precision == "int8-dynamic"

    def theirs(x, bias):
        return F.linear(x, dequantize(weight, x.dtype), bias)

    if dynamic:
        ops.quantized_linear(inputs[0], weight, inputs[1], dynamic)
    else:
        ours = lambda x, bias: ops.quantized_linear(x, weight, bias)  # noqa: E731
        check_operation(ours, theirs, inputs, [torch.randn(rows, 20)])
    ran = rows == 3 and not dynamic
    assert launches == ([f"{precision}_rows_kernel"] * 2 if ran else [])


def test_quantized_linear_of_what_the_kernels_do_not_take(launches):
    weight = quantize_weight(torch.randn(20, 64), "int8")
    with pytest.raises(RuntimeError, match="shapes"):
        ops.quantized_linear(torch.randn(3, 32), weight)
    with pytest.raises(RuntimeError, match=r"expand|broadcast|size"):
        ops.quantized_linear(torch.randn(3, 64), weight, torch.randn(7))
    apart = type(weight)(weight.values.t().contiguous().t(), weight.scale)
    x = torch.randn(3, 64)
    torch.testing.assert_close(
        ops.quantized_linear(x, apart), F.linear(x, dequantize(weight, x.dtype))
    )
    assert launches == []


@DTYPE
@pytest.mark.parametrize("rows", [3, 40])
def test_linear_gelu(launches, monkeypatch, dtype, rows):
    monkeypatch.setattr(vendor, "MANY_ROWS", 17)
    inputs = [_randn(*shape, dtype=dtype) for shape in ((rows, 24), (20, 24), (20,))]

    def theirs(x, weight, bias):
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    check_operation(ops.linear_gelu, theirs, inputs, [torch.randn(rows, 20)])
    fused = "linear_rows_kernel" if rows == 3 else "linear_kernel"
    assert (fused in launches) == (rows == 3 or dtype != torch.float32)
    assert "bias_gelu_bwd_kernel" in launches


def test_linear_gelu_differentiated_twice(monkeypatch):
    monkeypatch.setattr(vendor, "own_product", lambda *args, **kwargs: True)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((5, 8), (6, 8), (6,))]
    found = []
    for f in (ops.linear_gelu, lambda *t: F.gelu(F.linear(*t), approximate="tanh")):
        grads = torch.autograd.grad(f(*inputs).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@DTYPE
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy(launches, dtype, reduction):
    x, weight = _randn(2, 5, 24, dtype=dtype), _randn(61, 24, dtype=dtype) * 24**-0.5
    targets = torch.randint(0, 61, (2, 5))
    targets[0, 1] = -100

    def theirs(x, weight):
        logits = F.linear(x, weight).flatten(0, 1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits, targets.flatten(), reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss

    upstream = torch.rand(2, 5) if reduction == "none" else torch.tensor(0.7)
    check_operation(
        lambda x, weight: ops.linear_cross_entropy(x, weight, targets, reduction=reduction),
        theirs,
        [x, weight],
        [upstream],
    )
    assert "cross_entropy_bwd_kernel" in launches


def test_small_shares_of_a_mean_do_not_underflow_in_float16():
    n = 4096
    x = torch.randn(n, 8).half().requires_grad_()
    weight = (torch.randn(5, 8) / 8).half()
    targets = torch.randint(0, 5, (n,))
    with fastgpt.use_backend("reference"):
        loss = ops.linear_cross_entropy(x, weight, targets)
    (grad,) = torch.autograd.grad(loss * 2**12, x)
    exact = x.detach().double().requires_grad_()
    loss = F.cross_entropy(exact @ weight.double().mT, targets)
    (right,) = torch.autograd.grad(loss * 2**12, exact)
    torch.testing.assert_close(grad.double(), right, atol=1e-3, rtol=5e-3)


def test_what_the_kernels_do_not_take_is_refused_by_name():
    wide = torch.randn(2, 8193)
    with pytest.raises(fastgpt.BackendError, match=r"at most 8192 wide.*8193"):
        ops.layer_norm(wide, wide[0], wide[0])
    q = torch.randn(1, 1, 3, 129)
    with pytest.raises(fastgpt.BackendError, match=r"at most 128 wide.*129"):
        ops.causal_attention(q, q, q)
    with pytest.raises(fastgpt.BackendError, match="these are float64"):
        ops.gelu(torch.randn(3, dtype=torch.float64))
    with pytest.raises(fastgpt.BackendError, match="one dtype, these are bfloat16 and float32"):
        ops.layer_norm(torch.randn(3, 4, dtype=BF16), torch.ones(4), torch.zeros(4))


def test_registered_operations():
    x = torch.randn(2, 5, 24, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    q, k, v = (torch.randn(2, 3, 5, 16, requires_grad=True) for _ in range(3))
    rows = torch.randn(2, 24, requires_grad=True)
    own = torch.ops.fastgpt
    for op, arguments in (
        (own.bias_gelu, (x, bias)),
        (own.causal_attention, (q, k, v, 0.25)),
        (own.linear_cross_entropy, (rows, rows, torch.tensor([1, 0]), -100, "sum", True, True)),
    ):
        opcheck(op.default, arguments)


def test_reference_stays_reference(launches):
    with fastgpt.use_backend("reference"):
        x = torch.randn(3, 8)
        torch.testing.assert_close(
            ops.layer_norm(x, x[0], x[1]), reference.layer_norm(x, x[0], x[1])
        )
    assert launches == []
