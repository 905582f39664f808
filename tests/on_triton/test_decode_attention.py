import pytest
import torch

from fastgpt.triton.decode_attention import append, decode_attention
from on_triton.support import gpu
from on_triton.support.cases import DTYPE_IDS, DTYPES, Case, empty
from on_triton.support.compare import check

pytestmark = pytest.mark.usefixtures("interpreted")


def _torch(lengths, scale):
    def attention(q, keys, values):
        unseen = torch.arange(keys.shape[2]) >= torch.tensor(lengths)[:, None, None, None]
        scores = (q @ keys.mT * scale).masked_fill(unseen, -torch.inf)
        return torch.softmax(scores, dim=-1) @ values

    return attention


def _run(q, keys, values, lengths, scale=0.2, out=None):
    out = torch.full_like(q, torch.nan) if out is None else out
    lengths = torch.tensor(lengths, dtype=torch.int32).expand(len(q)).contiguous()
    decode_attention(q, keys, values, lengths, scale, out)
    return out


# The tests' GPU takes 4 programs: two splits of one head each, or one split where heads are many.
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("heads", [(1, 2), (2, 3)], ids=str)
@pytest.mark.parametrize(("length", "D"), [(1, 64), (64, 16), (65, 33), (200, 128)])
def test_against_float64(padded, dtype, heads, length, D):
    lengths = [length, 201 - length][: heads[0]]
    q = padded(torch.randn(*heads, 1, D).to(dtype), past_row=3)
    keys, values = (torch.randn(*heads, 200, D).to(dtype) for _ in range(2))
    for cache in (keys, values):
        for row, n in zip(cache, lengths, strict=True):
            row[:, n:] = torch.nan  # room for tokens to come
    keys, values = padded(keys, past_row=3), padded(values, past_row=3)
    out = _run(q, keys, values, lengths, out=padded.empty(*heads, 1, D, dtype=dtype, past_row=3))
    filled = [t.nan_to_num(0.0) for t in (q, keys, values)]
    check((out, None, None, None), _torch(lengths, 0.2), filled, [torch.ones_like(q)])


def test_layouts():
    q, keys, values = torch.randn(2, 1, 1, 16), torch.randn(2, 1, 90, 16), torch.randn(2, 1, 90, 16)
    out = _run(q, keys, values, 90)
    by_token = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, keys, values)]
    assert torch.equal(_run(*by_token, 90, out=torch.empty(2, 1, 1, 32)[..., :16]), out)
    assert torch.equal(_run(q, keys, values, 90), out)
    assert _run(torch.empty(0, 1, 1, 16), keys[:0], values[:0], 90).numel() == 0


def test_not_a_number_shows_and_minus_infinity_weighs_nothing():
    q, keys, values = torch.ones(1, 1, 1, 16), torch.randn(1, 1, 90, 16), torch.randn(1, 1, 90, 16)
    keys[:, :, :64] = -torch.inf
    torch.testing.assert_close(_run(q, keys, values, 65)[0, 0], values[0, 0, 64:65])
    keys[:, :, 70, 0] = torch.nan
    assert _run(q, keys, values, 70).isfinite().all()
    assert _run(q, keys, values, 71).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("H", "D"), [(1, 16), (8, 64), (9, 80), (25, 33)])
def test_append(padded, dtype, H, D):
    capacity = 5
    nothing = [(0, -1), (1, capacity), (2, 2**31 - 1)]
    places = [(2, 0), (0, 4), (0, 3), (1, 4), (2, 1), *nothing]
    row, position = padded(torch.tensor(places, dtype=torch.int32).T.contiguous())
    # As a packed product leaves queries, keys and values.
    _, k, v = padded(torch.randn(len(places), 3, H, D).to(dtype), past_row=3).unbind(1)
    caches = [padded(torch.randn(3, H, capacity, D).to(dtype), past_row=3) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    for cache, new in zip(expected, (k, v), strict=True):
        for token, (r, p) in enumerate(places[: -len(nothing)]):
            cache[r, :, p] = new[token]
    append(k, v, position, row, *caches)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))
    append(k[:0], v[:0], position[:0], row[:0], *caches)


def test_a_new_number_of_tokens_compiles_nothing_anew():
    with gpu.fake_gpu("sm_90") as launches:
        for tokens in (1, 2, 16, 1000):
            _append(torch.bfloat16, tokens)
        append(*_new(torch.bfloat16, 1000), *[gpu.Unaligned()] * 2, *_caches(torch.bfloat16))
    assert [launch.grid for launch in launches] == [(n, 2) for n in (1, 2, 16, 1000, 1000)]
    assert len({id(launch.compiled) for launch in launches}) == 1


@pytest.mark.parametrize(("batch", "splits"), [(1, 16), (8, 3), (64, 1)])
def test_splits_fill_the_gpu(batch, splits):
    with gpu.fake_gpu("sm_90") as launches:
        _case(batch).run(torch.bfloat16)
    names = ["decode_attention_split_kernel", "decode_attention_join_kernel"]
    assert [launch.name for launch in launches] == names[: 1 + (splits > 1)]
    assert launches[0].grid == (splits * 12 * batch,)


def _case(batch):
    def run(dtype):
        q, out = (empty(dtype, batch, 12, 1, 64) for _ in range(2))
        keys, values = (empty(dtype, batch, 12, 1024, 64) for _ in range(2))
        decode_attention(q, keys, values, empty(torch.int32, batch), 0.1, out)

    names = ("decode_attention_split_kernel", "decode_attention_join_kernel")
    return Case(run, wide=names if batch == 1 else names[:1], sample=("bfloat16", "float32"))


def _new(dtype, tokens):
    return empty(dtype, tokens, 3, 12, 64).unbind(1)[1:]


def _caches(dtype):
    return [empty(dtype, 8, 12, 1024, 64) for _ in range(2)]


def _append(dtype, tokens=64):
    places = [empty(torch.int32, tokens) for _ in range(2)]
    append(*_new(dtype, tokens), *places, *_caches(dtype))


CASES = {
    "split": _case(1),
    "whole": _case(64),
    "append": Case(_append, sample=("bfloat16", "float32")),
}
