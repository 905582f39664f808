import pytest
import torch

from fastgpt.triton.decode_attention import decode_attention
from on_triton.support import gpu
from on_triton.support.cases import DTYPE_IDS, DTYPES, Case, empty
from on_triton.support.compare import check

pytestmark = pytest.mark.usefixtures("interpreted")


def _torch(length, scale):
    def attention(q, keys, values):
        scores = q @ keys[:, :, :length].mT * scale
        return torch.softmax(scores, dim=-1) @ values[:, :, :length]

    return attention


def _run(q, keys, values, length, scale=0.2, out=None):
    out = torch.full_like(q, torch.nan) if out is None else out
    decode_attention(q, keys, values, torch.tensor(length, dtype=torch.int32), scale, out)
    return out


# The tests' GPU takes 4 programs: two splits of one head each, or one split where heads are many.
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("heads", [(1, 2), (2, 3)], ids=str)
@pytest.mark.parametrize(("length", "D"), [(1, 64), (64, 16), (65, 33), (200, 128)])
def test_against_float64(padded, dtype, heads, length, D):
    q = padded(torch.randn(*heads, 1, D).to(dtype), past_row=3)
    keys, values = (torch.randn(*heads, 200, D).to(dtype) for _ in range(2))
    for cache in (keys, values):
        cache[:, :, length:] = torch.nan  # room for tokens to come
    keys, values = padded(keys, past_row=3), padded(values, past_row=3)
    out = _run(q, keys, values, length, out=padded.empty(*heads, 1, D, dtype=dtype, past_row=3))
    filled = [t.nan_to_num(0.0) for t in (q, keys, values)]
    check((out, None, None, None), _torch(length, 0.2), filled, [torch.ones_like(q)])


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
        decode_attention(q, keys, values, empty(torch.int32, 1), 0.1, out)

    names = ("decode_attention_split_kernel", "decode_attention_join_kernel")
    dtypes = (torch.bfloat16, torch.float32)
    return Case(run, wide=names if batch == 1 else names[:1], dtypes=dtypes)


CASES = {"split": _case(1), "whole": _case(64)}
