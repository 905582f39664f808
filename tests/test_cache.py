import copy

import pytest
import torch
from test_generation import _models

import fastgpt
from fastgpt import KVCache


def _logits(book, idx):
    with torch.no_grad():
        return book(idx)


@pytest.mark.parametrize("pieces", [(10,), (1, 9), (4, 4, 2), (1,) * 10, (9, 1)])
@pytest.mark.parametrize("B", [1, 3])
def test_pieces_give_what_the_whole_gives(path, pieces, B):
    ours, book = _models()
    idx = torch.randint(0, 61, (B, 10))
    cache = KVCache(2)
    with torch.no_grad():
        got = torch.cat([ours(piece, cache=cache) for piece in idx.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(got, _logits(book, idx), atol=1e-4, rtol=1e-4)
    keys, values = cache.get(1)
    assert keys.shape == values.shape == (B, 3, 10, 16)


def test_with_gradients(path):
    ours, book = _models()
    idx = torch.randint(0, 61, (2, 10))
    cache = KVCache(2)
    got = torch.cat([ours(piece, cache=cache) for piece in idx.split((6, 4), dim=1)], dim=1)
    book(idx).square().sum().backward()
    got.square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), book.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-3, rtol=1e-3, msg=name)


@torch.no_grad()
def test_two_conversations_on_one_model(path):
    ours, book = _models()
    first, second = torch.randint(0, 61, (2, 1, 12))
    caches, got = (KVCache(2), KVCache(2)), ([], [])
    for step in range(0, 12, 3):
        for i, idx in enumerate((first, second)):
            got[i].append(ours(idx[:, step : step + 3], cache=caches[i]))
    for i, idx in enumerate((first, second)):
        torch.testing.assert_close(torch.cat(got[i], 1), book(idx), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_forked_conversation(path):
    """Both branches go on from the same slots; neither may write over the other."""
    ours, book = _models()
    start, left, right = torch.randint(0, 61, (3, 1, 5))
    cache = KVCache(2)
    ours(start, cache=cache)
    fork = KVCache(2)
    for layer in range(2):
        fork.update(layer, cache.get(layer))
    a, b = ours(left, cache=cache), ours(right, cache=fork)
    deep = copy.deepcopy(cache)
    c, d = ours(right, cache=cache), ours(right, cache=deep)
    for got, idx in ((a, [start, left]), (b, [start, right]), (c, [start, left, right])):
        exact = book(torch.cat(idx, 1))[:, -5:]
        torch.testing.assert_close(got, exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(c, d)


@torch.no_grad()
def test_pairs_made_by_somebody_else(path):
    """Beam search reorders the batch of every pair."""
    ours, book = _models()
    idx = torch.randint(0, 61, (3, 8))
    cache, order = KVCache(2), torch.tensor([2, 0, 0])
    ours(idx, cache=cache)
    for layer in range(2):
        keys, values = cache.get(layer)
        cache.update(layer, (keys[order], values[order]))
    more = torch.randint(0, 61, (3, 2))
    exact = book(torch.cat((idx[order], more), 1))[:, -2:]
    torch.testing.assert_close(ours(more, cache=cache), exact, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_models_own_cache(path):
    ours, book = _models()
    idx = torch.randint(0, 61, (1, 9))
    for _ in range(2):
        ours.reset_kv_cache()
        got = torch.cat([ours(t, use_cache=True) for t in idx.split((5, 4), dim=1)], dim=1)
        torch.testing.assert_close(got, book(idx), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(idx), book(idx), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_books_cached_generation_runs_unmodified(path):
    generate = pytest.importorskip("llms_from_scratch.kv_cache.generate")
    ours, book = _models()
    idx = torch.randint(0, 61, (2, 6))
    expected = fastgpt.reference.generate_text_simple(book, idx, 10, 24)
    assert torch.equal(generate.generate_text_simple(ours, idx, 10, 24), expected)
    stream = generate.generate_text_simple_stream(ours, idx, 10)
    assert torch.equal(torch.cat([idx, *stream], dim=1), expected)


@torch.no_grad()
@pytest.mark.parametrize("bad", ["length", "batch", "id", "dtype", "layers"])
def test_an_error_leaves_the_cache_as_it_was(path, bad):
    ours, book = _models()
    idx = torch.randint(0, 61, (1, 20))
    cache = KVCache(2)
    ours(idx, cache=cache)
    before = [tuple(t.clone() for t in pair) for pair in cache.get_all()]
    more, error = torch.randint(0, 61, (1, 3)), ValueError
    if bad == "length":
        more = torch.randint(0, 61, (1, 5))
    elif bad == "batch":
        more = more.expand(2, 3)
    elif bad == "id":
        more, error = torch.tensor([[3, 61]]), IndexError
    elif bad == "dtype":
        more, error = more.float(), TypeError
    else:
        cache.cache.pop()
        error = IndexError
    with pytest.raises(error, match="25 tokens.*20.*24" if bad == "length" else None):
        ours(more, cache=cache)
    for pair, old in zip(cache.get_all(), before, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(pair, old, strict=True))
    if bad != "layers":
        more = torch.randint(0, 61, (1, 4))
        exact = book(torch.cat((idx, more), 1))[:, 20:]
        torch.testing.assert_close(ours(more, cache=cache), exact, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_failure_in_the_middle_leaves_the_cache_as_it_was(path):
    ours, book = _models()
    idx = torch.randint(0, 61, (1, 8))
    cache = KVCache(2)
    ours(idx[:, :5], cache=cache)

    def fail(module, args):
        raise RuntimeError("in the middle")

    hook = ours.trf_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        ours(idx[:, 5:], cache=cache)
    hook.remove()
    assert cache.get(0)[0].shape[2] == 5
    got = ours(idx[:, 5:], cache=cache)
    torch.testing.assert_close(got, book(idx)[:, 5:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("piece", ["trf_blocks.0", "trf_blocks.1.att", "trf_blocks.0.ff.layers.0"])
def test_hooked_pieces(path, piece):
    ours, book = _models()
    calls = []
    ours.get_submodule(piece).register_forward_hook(lambda *a: calls.append(1))
    idx = torch.randint(0, 61, (2, 9))
    cache = KVCache(2)
    got = torch.cat([ours(t, cache=cache) for t in idx.split((5, 1, 3), dim=1)], dim=1)
    torch.testing.assert_close(got, book(idx), atol=1e-4, rtol=1e-4)
    assert len(calls) == 3


def test_reset():
    cache = KVCache(3)
    assert cache.get_all() == [None] * 3
    cache.update(1, (torch.ones(1), torch.ones(1)))
    assert cache.get(1) is not None
    cache.reset()
    assert cache.get_all() == [None] * 3


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{"n_heads": 6}, {"emb_dim": 24}, {"emb_dim": 96, "n_heads": 6}]
)
def test_the_cache_of_another_model(path, changes):
    """Its blocks are of another size: written to as if they were ours, they would be overrun."""
    cache = KVCache(2)
    _models(**changes)[0](torch.tensor([[1, 2, 3]]), cache=cache)
    before = [pair[0].clone() for pair in cache.get_all()]
    with pytest.raises(ValueError, match=r"the cache holds .* this model takes"):
        _models()[0](torch.tensor([[4]]), cache=cache)
    assert all(torch.equal(pair[0], old) for pair, old in zip(cache.get_all(), before, strict=True))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
def test_the_cache_of_another_dtype():
    ours, _ = _models()
    cache = KVCache(2)
    ours.bfloat16()(torch.tensor([[1, 2, 3]]), cache=cache)
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        ours.float()(torch.tensor([[4]]), cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("slots", [0, 2])
def test_a_model_of_no_layers_takes_no_cache_but_its_own(slots):
    """It would forget how many tokens there were: nothing of them is kept."""
    ours, _ = _models(n_layers=0)
    ids = torch.randint(0, 61, (1, 5))
    with pytest.raises(ValueError, match="a model of no layers has nothing to cache"):
        ours(ids, cache=KVCache(slots))
    parts = [ours(part, use_cache=True) for part in ids.split([3, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), ours(ids))
