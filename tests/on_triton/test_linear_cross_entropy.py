import pytest
import torch
from torch.nn import functional as F

from fastgpt.triton import linear_cross_entropy as module
from fastgpt.triton.linear_cross_entropy import linear_cross_entropy
from on_triton.support.cases import DTYPE_IDS, DTYPES, Case, empty
from on_triton.support.compare import check

pytestmark = pytest.mark.usefixtures("interpreted")

IGNORE = -100


def _inputs(rows, vocabulary, dtype):
    x, weight = torch.randn(rows, 24).to(dtype), torch.randn(vocabulary, 24).to(dtype)
    targets = torch.randint(vocabulary, (rows,))
    targets[2::5] = IGNORE
    return x, weight, targets


@pytest.mark.parametrize("chunk", [1, 4, 100], ids=lambda n: f"chunk{n}")
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_linear_cross_entropy(padded, monkeypatch, dtype, chunk):
    monkeypatch.setattr(module, "_chunk_rows", lambda pitch, itemsize: chunk)
    x, weight, targets = _inputs(11, 131, dtype)
    loss = padded.empty(11)
    dx, dweight = (padded.empty(*t.shape, dtype=dtype) for t in (x, weight))
    upstream = padded(torch.rand(11) + 0.5)
    linear_cross_entropy(x, weight, targets, IGNORE, loss, upstream, dx, dweight)

    def torchs(x, weight):
        return F.cross_entropy(x @ weight.t(), targets, ignore_index=IGNORE, reduction="none")

    check((loss, dx, dweight), torchs, (x, weight), [upstream])
    assert not dx[2::5].any()
    for wanted in ((None, None), (dx.clone(), None), (None, dweight.clone())):
        again = torch.empty_like(loss)
        linear_cross_entropy(x, weight, targets, IGNORE, again, upstream, *wanted)
        assert torch.equal(again, loss)
        for ours, before in zip(wanted, (dx, dweight), strict=True):
            assert ours is None or torch.equal(ours, before)


def _addmm(total, a, b, out_dtype=None, *, beta=1, out, addmm=torch.addmm):
    """torch.addmm as it is on a GPU, where it widens 16 bits."""
    if out_dtype is not None:
        assert out_dtype is total.dtype is torch.float32
        a, b = a.float(), b.float()
    return addmm(total, a, b, beta=beta, out=out)


@pytest.mark.parametrize("unrounded", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_weights_gradient_is_as_exact_over_many_chunks(monkeypatch, dtype, unrounded):
    monkeypatch.setattr(module, "_chunk_rows", lambda pitch, itemsize: 16)
    monkeypatch.setattr(module, "_adds_unrounded", lambda total: unrounded)
    monkeypatch.setattr(torch, "addmm", _addmm)
    x, weight, targets = _inputs(800, 7, dtype)
    x += 1
    loss, upstream = torch.empty(800), torch.full((800,), 1 / 800)
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    linear_cross_entropy(x, weight, targets, IGNORE, loss, upstream, dx, dweight)

    def torchs(x, weight):
        return F.cross_entropy(x @ weight.t(), targets, ignore_index=IGNORE, reduction="none")

    check((loss, dx, dweight), torchs, (x, weight), [upstream])


def test_chunks_keep_to_their_size():
    for pitch, itemsize in ((50304, 2), (50304, 4), (64, 4), (10**9, 4)):
        rows = module._chunk_rows(pitch, itemsize)
        assert rows == 1 or (rows % 128 == 0 and rows * pitch * itemsize <= module.CHUNK_BYTES)


def test_no_rows(padded):
    x, weight, targets = _inputs(0, 17, torch.float32)
    dweight, none = padded.empty(17, 24), torch.empty(0)
    linear_cross_entropy(x, weight, targets, IGNORE, none, none, x, dweight)
    assert not dweight.any()


def _run(dtype):
    x, weight = empty(dtype, 8192, 768), empty(dtype, 50257, 768)
    targets, loss = empty(torch.int64, 8192), empty(torch.float32, 8192)
    linear_cross_entropy(x, weight, targets, IGNORE, loss, loss, x, weight)


CASES = {
    "both": Case(
        _run, wide=("cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel"), sample_archs=("sm_90",)
    )
}
