import philox
import pytest
import torch

from fastgpt.triton.embedding import embedding, embedding_backward
from on_triton.support.cases import DTYPE_IDS, DTYPES, Case, empty
from on_triton.support.compare import check

pytestmark = pytest.mark.usefixtures("interpreted")


def _ids(kind, shape):
    """Ids below 17: drawn, all the same, or runs that end at and cross the tiles of the list."""
    if kind == "drawn":
        return torch.randint(17, shape)
    if kind == "same":
        return torch.full(shape, 5)
    runs = torch.repeat_interleave(torch.tensor([1, 3, 4, 9, 16]), torch.tensor([4, 1, 2, 18, 10]))
    return runs[torch.randperm(len(runs))].reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("kind", "shape", "tile", "width", "p"),
    [
        ("drawn", (1, 1), 4, 7, 0.3),
        ("drawn", (3, 9), 4, 96, 0.3),
        ("same", (2, 9), 4, 30, 0.0),
        ("same", (2, 70), 1, 30, 0.0),  # more tiles than are looked at at once
        ("runs", (5, 7), 4, 40, 0.0),
    ],
)
def test_embedding(padded, launched_with, kind, shape, tile, width, dtype, p):
    launched_with("token_bwd", ROWS=tile, BLOCK=32)
    idx, past = _ids(kind, shape).to(torch.int32 if kind == "same" else torch.int64), 3
    idx = padded(idx)
    tok = padded(torch.randn(17, width).to(dtype))
    pos = padded(torch.randn(past + shape[1] + 2, width).to(dtype))
    dy = padded(torch.randn(*shape, width).to(dtype))
    scale = philox.keep(2**35, dy.shape, p) if p else 1.0
    y = padded.empty(*shape, width, dtype=dtype)
    dtok, dpos = (padded.empty(*t.shape, dtype=dtype) for t in (tok, pos))
    embedding(idx, tok, pos, past, y, p, 2**35)
    embedding_backward(dy, idx, dtok, dpos, past, p, 2**35)

    def torchs(tok, pos):
        summed = tok[idx.long()] + pos[past : past + shape[1]]
        return (summed * scale).to(summed.dtype)

    check((y, dtok, dpos), torchs, (tok, pos), [dy])
    used = torch.zeros(17, dtype=torch.bool)
    used[idx.long().flatten()] = True
    assert not dtok[~used].any()


def test_the_position_on_the_device_and_only_what_is_wanted(padded):
    idx, tok, pos = torch.randint(17, (2, 5)), torch.randn(17, 8), torch.randn(9, 8)
    y, again, dtok, dpos = (padded.empty(*s) for s in ((2, 5, 8), (2, 5, 8), (17, 8), (9, 8)))
    embedding(idx, tok, pos, 4, y)
    embedding(idx, tok, pos, torch.tensor([4, 4], dtype=torch.int32), again)
    assert torch.equal(y, again)
    embedding_backward(y, idx, dtok, None, 4)
    embedding_backward(y, idx, None, dpos, 4)
    both = torch.empty_like(dtok), torch.empty_like(dpos)
    embedding_backward(y, idx, *both, 4)
    assert torch.equal(both[0], dtok)
    assert torch.equal(both[1], dpos)


@pytest.mark.parametrize("T", [1, 3])
def test_each_row_at_a_position_of_its_own(padded, T):
    idx, tok, pos = torch.randint(17, (6, T)), torch.randn(17, 8), torch.randn(9, 8)
    places = [4, 0, 6, 9, -1, 2]  # two of them outside
    y = padded.empty(6, T, 8)
    embedding(padded(idx), tok, pos, padded(torch.tensor(places, dtype=torch.int32)), y)
    for row, ids, place in zip(y, idx, places, strict=True):
        for t in range(T):
            if 0 <= place + t < 9:
                assert torch.equal(row[t], tok[ids[t]] + pos[place + t])
            else:
                assert row[t].isnan().all()


def test_outside_the_tables_nothing_is_read(padded):
    idx = torch.tensor([[3, 17, -1, 10**9, 2]])
    # Beside the tables lie numbers, which must not be taken for rows of theirs.
    tok, pos, y = torch.randn(19, 8)[1:18], torch.randn(6, 8)[1:5], padded.empty(1, 5, 8)
    embedding(idx, tok, pos, 0, y)
    assert torch.equal(y[0, 0], tok[3] + pos[0])
    assert y[0, 1:].isnan().all()  # the last by its position


@pytest.mark.parametrize("tile", [1, 4])
def test_outside_the_tables_nothing_is_written(padded, launched_with, tile):
    launched_with("token_bwd", ROWS=tile, BLOCK=32)
    idx = torch.tensor([[3, 17, -1, 10**9, 2, 17, 17, 17, -1, -1, 10**9, 3]])
    dtok, dy = padded.empty(17, 8), torch.ones(1, 12, 8)
    embedding_backward(dy, idx, dtok, None, 0)
    right = torch.zeros(17, 8)
    right[2], right[3] = 1, 2
    assert torch.equal(dtok, right)


def test_not_a_number_stays_with_its_token(padded):
    idx, dy = torch.tensor([[1, 2, 1, 2]]), torch.ones(1, 4, 8)
    dy[0, 2] = torch.nan
    dtok = padded.empty(17, 8)
    embedding_backward(dy, idx, dtok, None, 0)
    assert dtok[1].isnan().all()
    assert torch.equal(dtok[2], torch.full((8,), 2.0))


def test_no_tokens(padded):
    idx, y = torch.empty(0, 5, dtype=torch.int64), torch.empty(0, 5, 8)
    dtok, dpos = padded.empty(17, 8), padded.empty(9, 8)
    embedding(idx, dtok, dpos, 0, y)
    embedding_backward(y, idx, dtok, dpos, 0)
    assert not dtok.any()
    assert not dpos.any()


def _run(p):
    def run(dtype):
        idx = empty(torch.int64, 8, 1024)
        tok, pos, y = empty(dtype, 50257, 768), empty(dtype, 1024, 768), empty(dtype, 8, 1024, 768)
        embedding(idx, tok, pos, 0, y, p, 7)
        embedding(idx, tok, pos, idx[:, 0], y, p, 7)
        embedding_backward(y, idx, tok, pos, 0, p, 7)

    kernels = ("embedding_fwd_kernel", "token_bwd_kernel", "position_bwd_kernel")
    return Case(run, wide=(*kernels, "crossing_bwd_kernel"))


CASES = {
    "plain": _run(0.0)._replace(sample=("float32", "bfloat16")),
    "dropout": _run(0.1)._replace(sample_archs=("sm_90",)),
}
