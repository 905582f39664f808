import itertools

import philox
import pytest
import torch
from helpers import forward_backward
from torch.nn import functional as F

from fastgpt import reference
from fastgpt.triton import launch_table
from fastgpt.triton.causal_attention import causal_attention, causal_attention_backward
from on_triton.support import gpu
from on_triton.support.cases import DTYPE_IDS, DTYPES, MODES, Case, empty
from on_triton.support.compare import check

pytestmark = pytest.mark.usefixtures("interpreted")

# T, S, D: around a tile's rows (128 queries, 64 keys), longer keys, odd and padded head dims.
SIZES = [
    (3, 131, 24),
    (2, 2, 64),
    (7, 7, 5),
    (64, 64, 128),
    (65, 193, 33),
    (127, 128, 80),
    (129, 129, 64),
    (200, 200, 16),
]


def _seen(q, k):
    T, S = q.shape[2], k.shape[2]
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


def _torch(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_seen(q, k))


def _dropped(keep, scale=None):
    """Attention by its definition, its weights multiplied by keep."""

    def attention(q, k, v):
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        scores = (q @ k.mT * factor).masked_fill(~_seen(q, k), -torch.inf)
        return (torch.softmax(scores, dim=-1) * keep.to(q.dtype)) @ v

    return attention


def _inputs(B, H, T, S, D, dtype=torch.float32):
    """q, k, v and the gradient of the result."""
    shapes = [(B, H, T, D), (B, H, S, D), (B, H, S, D), (B, H, T, D)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def _run(q, k, v, dout, new=torch.full_like, **options):
    """out, dq, dk, dv and the log-sum-exp, all of them full of NaN before."""
    scale = options.pop("scale", q.shape[-1] ** -0.5)
    out, dq, dk, dv = (new(t, torch.nan) for t in (q, q, k, v))
    lse = torch.full(q.shape[:3], torch.nan)
    causal_attention(q, k, v, scale, out, lse, **options)
    causal_attention_backward(dout, q, k, v, out, lse, scale, dq, dk, dv, **options)
    return (out, dq, dk, dv), lse


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(padded, size, dtype):
    q, k, v, dout = (padded(t, past_row=3) for t in _inputs(1, 2, *size, dtype))
    results, lse = _run(q, k, v, dout, lambda t, nan: padded.empty(*t.shape, dtype=dtype))
    check(results, _torch, (q, k, v), [dout])
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    exact = scores.masked_fill(~_seen(q, k), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_a_single_key_has_all_the_weight(dtype):
    q, k, v, dout = _inputs(2, 2, 1, 1, 64, dtype)
    (out, dq, dk, dv), _ = _run(q, k, v, dout)
    assert torch.equal(out, v)
    assert torch.equal(dv, dout)
    largest = max(dq.abs().max(), dk.abs().max())
    assert largest < 1e-5 if dtype.itemsize == 2 else largest == 0  # nothing but the rounding of 0


def test_few_keys_lose_no_digits():
    """With two keys the gradients are a difference of what hardly differs; over many heads no more
    is lost in it than by PyTorch.
    """
    q, k, v, dout = _inputs(1, 64, 2, 2, 64)
    (_, *ours, _), _ = _run(q, k, v, dout)
    exact = forward_backward(_torch, [t.double() for t in (q, k, v)], [dout.double()])
    theirs = forward_backward(_torch, [q, k, v], [dout])
    for o, t, e in zip(ours, theirs[1:3], exact[1:3], strict=True):
        assert (o - e).norm() <= (t - e).norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("size", [(5, 70, 16), (130, 130, 64)], ids=str)
def test_dropout_against_float64(padded, size, dtype):
    (T, S, _), p, seed = size, 0.3, 2**40 + 5
    q, k, v, dout = (padded(t) for t in _inputs(2, 1, *size, dtype))
    results, _ = _run(q, k, v, dout, dropout_p=p, seed=seed)
    check(results, _dropped(philox.keep(seed, (2, 1, T, S), p)), (q, k, v), [dout])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_bit_for_bit(p):
    """With the identity for values, the result is the weights, and dv their transpose times dout;
    so both show which were dropped.
    """
    q, k, _, _ = _inputs(2, 2, 61, 61, 61)
    eye = torch.eye(61).expand(2, 2, 61, 61)
    for seed in (0, 7):
        (out, _, _, dv), _ = _run(q, k, eye, eye, dropout_p=p, seed=seed)
        expected = (philox.keep(seed, (2, 2, 61, 61), p) > 0) & _seen(q, k)
        assert torch.equal(out > 0, expected)
        assert torch.equal(dv.mT > 0, expected)


def test_dropout_of_everything():
    results, _ = _run(*_inputs(1, 1, 9, 9, 16), dropout_p=1.0, seed=3)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in results)


def test_layouts():
    q, k, v, dout = _inputs(2, 3, 70, 70, 16)
    exact, _ = _run(q, k, v, dout)
    packed = torch.stack([t.transpose(1, 2) for t in (q, k, v)], dim=2)  # [B, T, 3, H, D]
    gradients = torch.full_like(packed, torch.nan)
    views, dviews = (p.permute(2, 0, 3, 1, 4) for p in (packed, gradients))
    out = torch.full((2, 70, 3, 16), torch.nan).transpose(1, 2)
    lse = torch.empty(2, 3, 70)
    causal_attention(*views, 0.25, out, lse)
    causal_attention_backward(dout, *views, out, lse, 0.25, *dviews)
    assert all(torch.equal(a, b) for a, b in zip((out, *dviews), exact, strict=True))
    shared = k[:, :1].expand(2, 3, 70, 16)
    repeated, _ = _run(q, shared.contiguous(), v, dout)
    causal_attention(q, shared, v, 0.25, out)
    assert torch.equal(out, repeated[0])


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30])
def test_any_scale(scale):
    q, k, v, dout = _inputs(1, 1, 40, 50, 16)
    results, _ = _run(q, k, v, dout, scale=scale)
    check(results, _dropped(torch.ones(()), scale), (q, k, v), [dout])


def test_large_scores_do_not_overflow():
    q, k, v, dout = _inputs(1, 1, 90, 90, 16)
    q, k = 100 * q, 100 * k
    (out, dq, dk, dv), _ = _run(q, k, v, dout)
    check((out, None, None, None), _torch, (q, k, v), [dout])
    # A log-sum-exp of some 1e4 is itself rounded to 1e-3, and with it the weights of backward.
    exact = forward_backward(_torch, [t.double() for t in (q, k, v)], [dout.double()])[3]
    assert (dv - exact).norm() < 3e-3 * exact.norm()
    assert max(dq.abs().max(), dk.abs().max()) < 1e-3 * q.abs().max()  # 0 but for that


def test_a_later_token_changes_no_earlier_bit():
    q, k, v, dout = _inputs(1, 1, 200, 200, 16)
    (out, dq, _, _), lse = _run(q, k, v, dout)
    for t in (1, 63, 64, 128, 199):
        later = [torch.cat((x[:, :, :t], 50 * torch.randn_like(x[:, :, t:])), 2) for x in (q, k, v)]
        (other, other_dq, _, _), other_lse = _run(*later, dout)
        for a, b in ((out, other), (dq, other_dq), (lse, other_lse)):
            assert torch.equal(a[:, :, :t], b[:, :, :t])


def test_not_a_number_reaches_the_rows_that_see_it():
    q, k, v, dout = _inputs(1, 1, 100, 100, 16)
    k[0, 0, 70, 3] = torch.nan
    (out, *_), _ = _run(q, k, v, dout)
    assert out[0, 0, :70].isfinite().all()
    assert out[0, 0, 70:].isnan().all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the zeros past the last query times infinity
def test_a_tile_of_minus_infinity_weighs_nothing():
    _, k, v, dout = _inputs(1, 1, 70, 70, 16)
    k[:, :, :64] = -torch.inf
    (out, *_), _ = _run(torch.ones(1, 1, 70, 16), k, v, dout)
    torch.testing.assert_close(out[0, 0, 64], v[0, 0, 64], atol=1e-6, rtol=1e-6)
    assert out[0, 0, 64:].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8), (2, 0, 5, 8)], ids=str)
def test_empty(shape):
    B, H, T, D = shape
    results, _ = _run(*_inputs(B, H, T, max(T, 3), D))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in results)


def _packed(q, k, v, lengths, out=None):
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    out = torch.full_like(q, torch.nan) if out is None else out
    causal_attention(q, k, v, q.shape[-1] ** -0.5, out, packed=(bounds, max(lengths)))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("lengths", "D"),
    [([1, 130, 64, 7, 65], 16), ([129, 1, 1], 64), ([33, 2, 70], 80), ([5], 33)],
    ids=str,
)
def test_packed_sequences_against_float64(padded, lengths, D, dtype):
    q, k, v, dout = (padded(t, past_row=3) for t in _inputs(1, 2, *[sum(lengths)] * 2, D, dtype))
    out = _packed(q, k, v, lengths, padded.empty(*q.shape, dtype=dtype, past_row=3))

    def definition(q, k, v):
        return reference.packed_causal_attention(q, k, v, lengths)

    check((out, None, None, None), definition, (q, k, v), [dout])


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the others
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_a_packed_sequence_is_what_it_is_alone(dtype):
    lengths = [3, 140, 1, 70]
    qkv = [t.to(dtype) for t in _inputs(1, 2, *[sum(lengths)] * 2, 16)[:3]]
    # As a packed product leaves them.
    qkv = torch.stack([t.transpose(1, 2) for t in qkv], dim=2).permute(2, 0, 3, 1, 4)
    out = _packed(*qkv, lengths).split(lengths, dim=2)
    for i, one in enumerate(qkv.split(lengths, dim=3)):
        alone = torch.full_like(out[i], torch.nan)
        causal_attention(*one, 0.25, alone)
        assert torch.equal(out[i], alone)
        others = torch.full_like(qkv, torch.nan)
        others.split(lengths, dim=3)[i].copy_(one)
        assert torch.equal(_packed(*others, lengths).split(lengths, dim=2)[i], alone)


def test_new_lengths_of_packed_sequences_compile_nothing_anew():
    with gpu.fake_gpu("sm_90") as launches:
        for tokens, n, longest in ((4096, 8, 1024), (17, 17, 1), (1000, 3, 999), (16, 1, 16)):
            _run_packed(torch.bfloat16, 64, tokens, longest, empty(torch.int32, n + 1))
        _run_packed(torch.bfloat16, 64, 4096, 1024, gpu.Unaligned(9))
    tiles = [8 * 8, 17, 3 * 8, 1, 8 * 8]
    assert [launch.grid for launch in launches] == [(12 * n,) for n in tiles]
    assert len({id(launch.compiled) for launch in launches}) == 1


def _run_packed(dtype, D, tokens=4096, longest=1024, bounds=None):
    q, k, v = empty(dtype, tokens, 3, 12, D).transpose(0, 2)[None].unbind(2)
    out = empty(dtype, tokens, 12, D).transpose(0, 1)[None]
    bounds = empty(torch.int32, 9) if bounds is None else bounds
    causal_attention(q, k, v, 0.1, out, packed=(bounds, longest))


def test_a_new_length_or_seed_compiles_nothing_anew():
    with gpu.fake_gpu("sm_90") as launches:
        for T, S, seed in ((1024, 1024, 7), (1000, 1000, 1), (17, 300, 2**40), (1, 64, 16)):
            q, k, out = (empty(torch.bfloat16, 2, 12, n, 64) for n in (T, S, T))
            lse = empty(torch.float32, 2, 12, T)
            causal_attention(q, k, k, 0.125, out, lse, 0.1, seed)
            causal_attention_backward(out, q, k, k, out, lse, 0.125, q, k, k, 0.1, seed)
    assert len(launches) == 4 * 3
    assert len({id(launch.compiled) for launch in launches}) == 3
    assert [launch.grid for launch in launches[:3]] == [(8 * 24,)] * 3


def test_every_shape_has_settings():
    for kernel in ("fwd", "bwd_dq", "bwd_dkdv"):
        for arch in gpu.ARCHS:
            for itemsize in (2, 4):
                for size in ("narrow", "dropout", "wide"):
                    row = launch_table.lookup(f"causal_attention_{kernel}", arch, itemsize, size)
                    assert {"BLOCK_M", "BLOCK_N"} <= row.keys()


def _case(D, dropout_p, *sample):
    def run(dtype):
        packed, gradients = (empty(dtype, 2, 1024, 3, 12, D) for _ in range(2))
        q, k, v = packed.transpose(1, 3).unbind(2)
        out, dout = (empty(dtype, 2, 1024, 12, D).transpose(1, 2) for _ in range(2))
        lse = empty(torch.float32, 2, 12, 1024)
        causal_attention(q, k, v, 0.1, out, lse, dropout_p, seed=7)
        dqkv = gradients.transpose(1, 3).unbind(2)
        causal_attention_backward(dout, q, k, v, out, lse, 0.1, *dqkv, dropout_p, seed=7)

    kernels = ("fwd", "bwd_dq", "bwd_dkdv")
    names = tuple(f"causal_attention_{name}_kernel" for name in kernels)
    # The gradients of wide keys have tiles too small for Hopper's and Blackwell's own products.
    if D > 64:
        spills = tuple(itertools.product(names[1:], DTYPE_IDS))
    else:
        spills = ((names[2], "float32"),) if dropout_p else ()
    matrix = names if D == 64 else names[:2]
    return Case(run, matrix, names, sample, modes=tuple(MODES), spills=spills)


def _packed_case(D, *sample):
    names = ("causal_attention_fwd_kernel",)
    return Case(lambda dtype: _run_packed(dtype, D), names, names, sample, modes=tuple(MODES))


# Dropout and odd widths take the most registers of the launches that share a row of the settings.
CASES = {
    "narrow": _case(64, 0.0, "bfloat16"),
    "dropout": _case(64, 0.1, "bfloat16", "float32"),
    "wide": _case(128, 0.1, "bfloat16"),
    "packed": _packed_case(64, "bfloat16"),
    "packed, odd": _packed_case(80, "bfloat16", "float32"),
    "odd": _case(80, 0.1, "bfloat16", "float32"),
}
