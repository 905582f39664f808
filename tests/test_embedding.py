import pytest
import torch
from helpers import check_operation
from torch.nn import functional as F

from fastgpt.ops import embedding


@pytest.mark.parametrize("width", [1, 16, 48, 65, 200])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_embedding(path, width, dtype):
    """Ids come often and not at all; positions start behind a cache."""
    idx = torch.randint(0, 5, (3, 40)).to(dtype)
    tables = [torch.randn(9, width), torch.randn(50, width)]
    check_operation(
        lambda tok, pos: embedding(idx, tok, pos, past=7),
        lambda tok, pos: F.embedding(idx, tok) + pos[7:47],
        tables,
        [torch.randn(3, 40, width)],
    )


@pytest.mark.parametrize("which", ["tok", "pos"])
def test_nothing_is_made_for_a_frozen_table(path, which):
    tables = {name: torch.randn(9, 8, requires_grad=name != which) for name in ("tok", "pos")}
    embedding(torch.randint(0, 9, (2, 3)), **tables).sum().backward()
    assert tables[which].grad is None
    (other,) = (t for name, t in tables.items() if name != which)
    assert other.grad.sum() == 2 * 3 * 8


def test_odd_layouts(path):
    idx = torch.randint(0, 9, (5, 2)).t()
    tok = torch.randn(8, 9).t().requires_grad_()
    pos = torch.randn(6, 16)[:, ::2].requires_grad_()
    theirs = tok[idx] + pos[:5]
    ours = embedding(idx, tok, pos)
    assert torch.equal(ours, theirs)
    upstream = torch.randn(2, 5, 8)
    grads = (torch.autograd.grad(y, (tok, pos), upstream) for y in (ours, theirs))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty(path, shape):
    tok, pos = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    embedding(torch.zeros(shape, dtype=torch.int64), tok, pos).sum().backward()
    assert torch.equal(tok.grad, torch.zeros(4, 8))
    assert torch.equal(pos.grad, torch.zeros(4, 8))


@pytest.mark.parametrize("bad", [-1, 4])
def test_an_id_outside_the_vocabulary_is_named(path, bad):
    with pytest.raises(IndexError, match=f"token id {bad} is outside the vocabulary of 4"):
        embedding(torch.tensor([[1, bad]]), torch.randn(4, 8), torch.randn(4, 8))


def test_an_empty_vocabulary_has_no_id(path):
    with pytest.raises(IndexError, match="token id 1 is outside the vocabulary of 0"):
        embedding(torch.tensor([[1]]), torch.randn(0, 8), torch.randn(4, 8))


def test_a_negative_position_is_refused(path):
    """It would be memory in front of the table."""
    with pytest.raises(ValueError, match="past -1 must be at least 0"):
        embedding(torch.tensor([[1, 2]]), torch.randn(4, 8), torch.randn(4, 8), past=-1)


def test_shapes_that_do_not_fit(path):
    idx = torch.zeros(1, 3, dtype=torch.int64)
    for tok, pos, past in ((8, 9, 0), (8, 8, 2)):
        with pytest.raises(ValueError, match="do not fit"):
            embedding(idx, torch.randn(4, tok), torch.randn(4, pos), past)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.float32], ids=str)
def test_other_ids_are_refused(path, dtype):
    with pytest.raises(TypeError, match="must be int32 or int64"):
        embedding(torch.zeros(1, 3, dtype=dtype), torch.randn(4, 8), torch.randn(4, 8))


def test_second_derivative(path):
    idx = torch.randint(0, 4, (2, 3))
    tables = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
    seconds = []
    for f in (embedding, lambda idx, tok, pos: F.embedding(idx, tok) + pos[:3]):
        grads = torch.autograd.grad(f(idx, *tables).sin().sum(), tables, create_graph=True)
        norm = sum(g.square().sum() for g in grads)
        seconds.append(torch.autograd.grad(norm, tables))
    torch.testing.assert_close(*seconds)
