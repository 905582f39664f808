"""Generation by captured steps, with capturing replaced by running the step."""

import copy
import gc

import pytest
import torch
from pairs import CONFIG, pair, some_ids

import fastgpt
from fastgpt import reference
from fastgpt.triton import choices, decode

pytestmark = pytest.mark.usefixtures("dispatched", "captures")


@pytest.fixture
def captures(monkeypatch):
    """The runs that were captured; a replay runs them again into the same memory."""
    found = []

    def capture(run):
        result = run().clone()
        found.append(run)
        return lambda: result.copy_(run()), result

    monkeypatch.setattr(decode, "capture", capture)
    # The products have their own tests, and interpreting them takes most of the time.
    monkeypatch.setattr(choices, "own_product", lambda *args, **kwargs: False)
    return found


def _same(ours, book, ids, new, context=CONFIG["context_length"]):
    mine = fastgpt.generate_text_simple(ours, ids, new, context)
    assert torch.equal(mine, reference.generate_text_simple(book, ids, new, context))


def test_the_books_tokens(captures):
    ours, book = pair()
    _same(ours, book, some_ids(B=2, T=3), 12)
    _same(ours, book, some_ids(B=2, T=5, seed=3), 9)  # the same graph from another position
    assert len(captures) == 1
    _same(ours, book, some_ids(B=1, T=3), 8 + 1)
    assert len(captures) == 2  # one a batch size


def test_up_to_the_context_and_past_it(captures):
    ours, book = pair(context_length=12, n_layers=1)
    _same(ours, book, some_ids(B=1, T=3), 14, 12)
    _same(ours, book, some_ids(B=1, T=3), 14, 9)
    assert len(captures) == 1
    with pytest.raises(ValueError, match=r"13 tokens.* context length 12"):
        fastgpt.generate_text_simple(ours, some_ids(B=1, T=3), 14, 20)


def test_parameters_are_read_live(captures):
    ours, book = pair(n_layers=1)
    ids = some_ids(B=1, T=3)
    _same(ours, book, ids, 9)
    with torch.no_grad():
        for model in (ours, book):
            model.out_head.weight.data.copy_(model.out_head.weight.flip(0))
            model.trf_blocks[0].ff.layers[0].weight.mul_(-2)
    _same(ours, book, ids, 9)
    assert len(captures) == 1


def test_replaced_parameters_are_captured_anew(captures):
    ours, book = pair(n_layers=1)
    ids = some_ids(B=1, T=3)
    _same(ours, book, ids, 9)
    for model in (ours, book):
        flipped = model.out_head.weight.detach().flip(0).clone()
        model.out_head.weight = torch.nn.Parameter(flipped)
    _same(ours, book, ids, 9)
    assert len(captures) == 2


def test_few_steps_other_models_and_streams_go_without(captures):
    ours, book = pair(n_layers=1)
    ids = some_ids(B=1, T=3)
    _same(ours, book, ids, decode.MIN_STEPS)
    assert len(list(fastgpt.generate_stream(ours, ids, 12, 32))) == 12
    for model in (ours, book):
        model.trf_blocks[0].ff = torch.nn.Linear(CONFIG["emb_dim"], CONFIG["emb_dim"])
    book.load_state_dict(ours.state_dict())
    _same(ours, book, ids, 12)
    assert captures == []


def test_two_at_once_have_a_graph_each(captures):
    ours, book = pair(n_layers=1)
    first, second = some_ids(B=1, T=3), some_ids(B=1, T=4, seed=2)
    cache = [fastgpt.KVCache(1) for _ in range(2)]
    with torch.no_grad():
        for ids, c in zip((first, second), cache, strict=True):
            ours(ids, cache=c)
        with decode.stepping(ours, cache[0], 9) as one, decode.stepping(ours, cache[1], 9) as two:
            for token in (5, 6, 7):
                new = torch.tensor([[token]])
                logits = [one(new).clone(), two(new).clone()]
                first, second = (torch.cat((ids, new), 1) for ids in (first, second))
                for mine, ids in zip(logits, (first, second), strict=True):
                    torch.testing.assert_close(mine[:, 0], book(ids)[:, -1], atol=1e-4, rtol=1e-4)
    assert len(captures) == 2


def test_graphs_go_with_their_model(captures):
    ours, book = pair(n_layers=1)
    _same(ours, book, some_ids(B=1, T=3), 9)
    again = copy.deepcopy(ours)
    before = len(decode._idle)
    del ours
    captures.clear()
    gc.collect()
    assert len(decode._idle) == before - 1
    _same(again, book, some_ids(B=1, T=3), 9)
    assert len(captures) == 1
