"""Scores of texts by packed passes on interpreted kernels."""

import pytest
import torch
from helpers import assert_as_exact
from pairs import CONFIG, pair, some_ids
from torch import nn
from torch.nn import functional as F

import fastgpt
from fastgpt import dispatch
from fastgpt.model import scoring
from fastgpt.quantized_weight import PRECISIONS
from on_triton.support.cases import DTYPE_IDS, DTYPES

VOCABULARY, CONTEXT = CONFIG["vocab_size"], CONFIG["context_length"]
LENGTHS = [3, CONTEXT + 1, 1, 7, 2, 2 * CONTEXT + 5, CONTEXT, 12]
STRIDE = 20


@pytest.fixture
def packs(monkeypatch):
    """How many texts each packed pass had."""
    found, packed = [], scoring.packed
    monkeypatch.setattr(
        scoring, "packed", lambda texts, *rest: found.append(len(texts)) or packed(texts, *rest)
    )
    return found


def _texts(lengths=LENGTHS):
    return [some_ids(B=1, T=n, seed=n)[0].tolist() for n in lengths]


@torch.no_grad()
def _text_by_text(model, texts, stride=STRIDE):
    """The usual convention, written out."""
    found = []
    for ids in texts:
        scores = []
        for begin in range(0, len(ids) - 1, stride):
            inputs = torch.tensor(ids[begin : begin + CONTEXT + 1])
            logits = model(inputs[None, :-1])[0]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            every = -F.cross_entropy(logits, inputs[1:], reduction="none")
            scores += every[len(scores) - begin :]
            if begin + CONTEXT >= len(ids) - 1:
                break
        found += scores
    return torch.stack(found)


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("head_dim", [16, 80])
def test_texts_of_any_lengths_in_one_pass(packs, dtype, head_dim):
    ours, book = (m.to(dtype) for m in pair(emb_dim=2 * head_dim, n_heads=2, n_layers=2))
    _, exact = pair(emb_dim=2 * head_dim, n_heads=2, n_layers=2)
    exact.load_state_dict(book.state_dict())  # the same numbers as in dtype
    texts = _texts()
    got = fastgpt.score(ours, texts, stride=STRIDE)
    assert packs == [9]  # of eight texts one holds a single token, and one takes three windows
    assert [len(one) for one in got] == [len(text) - 1 for text in texts]
    assert all(one.dtype is torch.float32 for one in got)
    exact = _text_by_text(exact.double(), texts)
    assert_as_exact(torch.cat(got), _text_by_text(book, texts), exact)


@pytest.mark.usefixtures("dispatched")
def test_passes_of_so_many_tokens_of_like_lengths(packs, monkeypatch):
    ours, book = pair(n_layers=1)
    texts = _texts()
    together = fastgpt.score(ours, texts, stride=STRIDE)
    monkeypatch.setattr(scoring, "_MOST_ON_GPU", 40)
    got = fastgpt.score(ours, texts, stride=STRIDE)
    # Of 1, 2, 6 and 11 inputs, and of 28, 31 and three times 32.
    assert packs == [9, 4, 1, 1, 1, 1, 1]
    torch.testing.assert_close(torch.cat(got), torch.cat(together), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(got), _text_by_text(book, texts), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize("precision", [None, *PRECISIONS])
def test_heads_that_hold_few_logits(packs, monkeypatch, precision):
    """Those with a bias, or quantised."""
    ours, book = pair(emb_dim=96, n_layers=1)
    if precision is None:
        for model in (ours, book):
            head = nn.Linear(96, VOCABULARY)
            head.weight = model.out_head.weight
            nn.init.constant_(head.bias, 0.25)
            model.out_head = head
    else:
        ours = book = fastgpt.quantize(ours.eval(), precision)
    most = []
    whole = scoring._cross_entropy
    monkeypatch.setattr(scoring, "_MOST_LOGITS", 20)
    monkeypatch.setattr(scoring, "_cross_entropy", lambda x, y: most.append(len(x)) or whole(x, y))
    texts = _texts([9, 30, 2, 17])
    got = torch.cat(fastgpt.score(ours, texts))
    assert packs == [4]
    assert most == [20, 20, 14]
    with fastgpt.use_backend("reference"):
        expected = _text_by_text(book, texts)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0.02 if precision else 1e-4)


def _hook(model):
    model.trf_blocks[0].att.register_forward_hook(lambda *_: None)


def _wrapped(model):
    att = model.trf_blocks[0].att
    att.W_query = nn.Sequential(att.W_query)


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize("change", [_hook, _wrapped])
def test_modified_models_go_text_by_text(packs, change):
    ours, book = pair(n_layers=1)
    change(ours)
    texts = _texts([9, 3])
    got = torch.cat(fastgpt.score(ours, texts))
    assert packs == []
    torch.testing.assert_close(got, _text_by_text(book, texts), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize("text", [[1, VOCABULARY, 2], [1, 2, VOCABULARY], [1, 2**40]])
def test_ids_outside_the_vocabulary(packs, text):
    ours, _ = pair(n_layers=1)
    with pytest.raises(IndexError, match=str(max(text))):
        fastgpt.score(ours, [[1, 2, 3], text])
    assert packs == []


@pytest.mark.filterwarnings("ignore:.*does not compile:fastgpt.BackendWarning")
@pytest.mark.parametrize("op", ["causal_attention", "embedding"])
def test_without_a_kernel_text_by_text(dispatched, packs, monkeypatch, op):
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "_BY_DEVICE", {"cpu": "triton"})
    ours, book = pair(n_layers=1)

    def fails(*args, **kwargs):
        dispatch._failed[op, None] = "does not compile"
        raise dispatch.KernelError("does not compile")

    launchers = dispatch.module("triton", op, ours.pos_emb.weight)
    monkeypatch.setitem(vars(launchers), op, fails)
    texts = _texts([9, 3])
    with fastgpt.use_backend("auto"):
        got = torch.cat(fastgpt.score(ours, texts))
        assert torch.equal(torch.cat(fastgpt.score(ours, texts)), got)
    assert packs == [2]
    torch.testing.assert_close(got, _text_by_text(book, texts), rtol=1e-4, atol=1e-4)
