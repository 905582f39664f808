import pytest
import torch
from helpers import assert_as_exact, check_operation, opcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt
from fastgpt import reference
from fastgpt.ops import causal_attention

# Around one row, a group of rows, a tile of queries (48), a tile of keys (64) and several of them.
LENGTHS = [1, 2, 7, 47, 48, 49, 64, 65, 127, 128, 129, 300]


def _torch(q, k, v):
    T, S = q.shape[2], k.shape[2]
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def _plain(q, k, v):
    T, S = q.shape[2], k.shape[2]
    return reference.causal_attention(q, k, v, torch.ones(T, S, dtype=torch.bool).triu(S - T + 1))


def _qkv(B, H, T, D, S=None):
    return torch.randn(B, H, T, D), torch.randn(B, H, S or T, D), torch.randn(B, H, S or T, D)


@pytest.mark.parametrize("T", LENGTHS)
def test_lengths(path, T):
    # Of few numbers PyTorch's largest error, the measure, is a matter of luck.
    B = 2 if T > 7 else 16
    check_operation(causal_attention, _torch, _qkv(B, 3, T, 64), [torch.randn(B, 3, T, 64)])


@pytest.mark.parametrize("D", [1, 5, 16, 24, 33, 64, 80, 128, 200])
def test_head_dims(path, D):
    check_operation(causal_attention, _torch, _qkv(1, 2, 70, D), [torch.randn(1, 2, 70, D)])


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 100), (3, 64), (50, 129), (64, 65), (100, 400)])
def test_queries_at_the_end_of_longer_keys(path, T, S):
    check_operation(causal_attention, _torch, _qkv(2, 2, T, 24, S), [torch.randn(2, 2, T, 24)])


@pytest.mark.parametrize("T", [1023, 1024])
def test_gpt2_heads(path, T):
    q, k, v = _qkv(1, 12, T, 64)
    exact = _torch(q.double(), k.double(), v.double())
    assert_as_exact(causal_attention(q, k, v), _torch(q, k, v), exact)


def test_rows_of_even_weights(path):
    """Whose sums gather the rounding of each of a thousand keys."""
    for seed in range(8):
        torch.manual_seed(seed)
        q, k, v = _qkv(1, 2, 64, 16, 1024)
        k = k[:, :, :1].expand_as(k)
        exact = _torch(q.double(), k.double(), v.double())
        allowed = 2 * (_torch(q, k, v) - exact).norm()
        assert (causal_attention(q, k, v) - exact).norm() <= allowed


def test_layouts(path):
    q, k, v = _qkv(2, 3, 50, 16)
    y = causal_attention(q, k, v)
    by_token = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    packed = torch.stack(by_token, dim=3).unbind(
        3
    )  # views of one block, as one product leaves them
    by_column = [t.mT.contiguous().mT for t in (q, k, v)]
    for tensors in (by_token, packed, by_column):
        torch.testing.assert_close(causal_attention(*tensors), y, atol=1e-6, rtol=1e-5)
    shared = k[:, :1].expand(2, 3, 50, 16)
    exact = causal_attention(q, shared.contiguous(), v)
    torch.testing.assert_close(causal_attention(q, shared, v), exact, atol=1e-6, rtol=1e-5)
    if path != "reference":
        assert y.transpose(1, 2).is_contiguous()


def test_scale(path):
    q, k, v = _qkv(1, 2, 40, 16)
    torch.testing.assert_close(
        causal_attention(q, k, v, scale=0.5), causal_attention(q * 2.0, k, v), atol=1e-6, rtol=1e-5
    )
    zero = causal_attention(q, k, v, scale=1e-30)
    means = v.cumsum(2) / torch.arange(1, 41)[:, None]
    torch.testing.assert_close(zero, means, atol=1e-6, rtol=1e-5)


def test_a_scale_of_nought_weighs_all_alike(path):
    q, k, v = _qkv(1, 2, 40, 16)
    means = v.cumsum(2) / torch.arange(1, 41)[:, None]
    torch.testing.assert_close(causal_attention(q, k, v, scale=0.0), means, atol=1e-6, rtol=1e-5)


def test_a_later_token_changes_no_earlier_bit(path):
    q, k, v = _qkv(1, 2, 200, 24)
    y = causal_attention(q, k, v)
    for t in (1, 5, 47, 48, 63, 64, 130, 199):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, t:], v2[:, :, t:] = torch.randn_like(k[:, :, t:]) * 50, 1e30
        assert torch.equal(causal_attention(q, k2, v2)[:, :, :t], y[:, :, :t])


def test_large_scores_do_not_overflow(path):
    q, k, v = (t * 100 for t in _qkv(1, 1, 90, 16))
    exact = _torch(q.double(), k.double(), v.double())
    assert_as_exact(causal_attention(q, k, v), _torch(q, k, v), exact)


def test_the_only_key_of_large_scores_passes_on_no_gradient(path):
    """But for the rounding of dout v^T: backward must make the very weights of forward, here 1."""
    q, k, v = (t.requires_grad_() for t in (30 * torch.randn(64, 2, 1, 24) for _ in range(3)))
    dout = torch.randn(64, 2, 1, 24)
    dq, dk = torch.autograd.grad(causal_attention(q, k, v), (q, k), dout)
    terms = (dout * v).abs().sum(-1, keepdim=True) / 24**0.5
    rounding = 16 * torch.finfo(torch.float32).eps * terms
    assert ((dq.abs() <= rounding * k.abs()) & (dk.abs() <= rounding * q.abs())).all()


def test_not_a_number_reaches_the_rows_that_see_it(path):
    q, k, v = _qkv(1, 1, 100, 16)
    k[0, 0, 70, 3] = torch.nan
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if path == "reference" and not torchs[0, 0, 70:].isnan().all():
        pytest.skip(f"the attention of torch {torch.__version__} loses NaN")
    y = causal_attention(q, k, v)
    assert y[0, 0, :70].isfinite().all()
    assert y[0, 0, 70:].isnan().all()


def test_a_tile_of_minus_infinity_weighs_nothing(path):
    q, k, v = torch.ones(1, 1, 70, 16), *_qkv(1, 1, 70, 16)[1:]
    k[:, :, :64] = -torch.inf
    y = causal_attention(q, k, v)
    torch.testing.assert_close(y[0, 0, 64], v[0, 0, 64], atol=1e-6, rtol=1e-6)
    assert y[0, 0, 64:].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8), (2, 0, 5, 8)])
def test_empty(path, shape):
    q = torch.randn(shape, requires_grad=True)
    y = causal_attention(q, q, q)
    y.sum().backward()
    assert y.shape == q.grad.shape == shape


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("H", [1, 2, 12])
def test_threads_give_the_same_bits(path, threads, H):
    q, k, v = _qkv(1, H, 150, 32)
    y, before = causal_attention(q, k, v), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(causal_attention(q, k, v), y)
    finally:
        torch.set_num_threads(before)


def test_only_the_gradients_asked_for(path):
    q, k, v = _qkv(1, 2, 20, 8)
    v.requires_grad_()
    causal_attention(q, k, v).sum().backward()
    exact = v.detach().clone().requires_grad_()
    _torch(q, k, exact).sum().backward()
    assert q.grad is k.grad is None
    torch.testing.assert_close(v.grad, exact.grad)


def test_bad_shapes(path):
    q, k, v = _qkv(1, 2, 20, 8)
    short = k[:, :, :19], v[:, :, :19]
    for bad in [(q, k[:, :1], v), (q, k[..., :4], v), (q, *short), (q[0], k[0], v[0])]:
        with pytest.raises(ValueError, match="do not fit"):
            causal_attention(*bad)


def test_memory_holds_no_block_of_queries_by_keys():
    """4096 tokens in 4 heads would be 268 MB of scores; the peak moves by far less."""
    if not fastgpt.backends()["cpu"].available:
        pytest.skip(fastgpt.backends()["cpu"].reason)
    import resource

    q, k, v = _qkv(1, 4, 4096, 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    causal_attention(q, k, v)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KB


def test_registered_operation(path):
    q, k, v = (t.requires_grad_() for t in _qkv(1, 2, 9, 8))
    opcheck(torch.ops.fastgpt.causal_attention.default, (q, k, v, 0.3))


def test_double_backward(path):
    exact = [t.double().requires_grad_() for t in _qkv(1, 1, 6, 4)]
    if path == "reference":
        pytest.skip("PyTorch's own fast operation has no second derivative")
    results = []
    for f, q, k, v in [(causal_attention, *(t.float() for t in exact)), (_plain, *exact)]:
        grads = torch.autograd.grad(f(q, k, v).square().sum(), [q, k, v], create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), exact))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


class _Names(TorchDispatchMode):
    """Collects the names of PyTorch's operations."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("S", [1, 9])
def test_one_query_on_the_reference_makes_no_mask(S):
    q, k, v = _qkv(1, 2, 1, 16, S)
    with fastgpt.use_backend("reference"), _Names() as names:
        causal_attention(q, k, v)
    assert names.seen == ["_scaled_dot_product_flash_attention_for_cpu"]
