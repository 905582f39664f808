"""Log-probabilities of texts of any lengths, as each text has them alone."""

import random

import pytest
import torch
from helpers import assert_as_exact
from pairs import pair, some_ids
from quantized_models import quantized
from test_generation import _models
from torch import nn
from torch.nn import functional as F

import fastgpt
from fastgpt import cpu
from fastgpt.model import rows, scoring

CONTEXT = 24


def _texts(n=12, lengths=(1, 2, 5, 9, 17, 24, 25)):
    some = random.Random(2)
    return [[some.randrange(61) for _ in range(some.choice(lengths))] for _ in range(n)]


@torch.no_grad()
def _one_by_one(model, text):
    ids = torch.tensor(text)
    return -F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")


@torch.no_grad()
def _check(model, book, texts):
    ours = fastgpt.score(model, texts)
    assert [len(one) for one in ours] == [len(text) - 1 for text in texts]
    longer = [(one, text) for one, text in zip(ours, texts, strict=True) if len(text) > 1]
    ours = torch.cat([one for one, _ in longer])
    theirs = torch.cat([_one_by_one(book, text) for _, text in longer])
    book = book.double()
    exact = torch.cat([_one_by_one(book, text) for _, text in longer])
    assert_as_exact(ours, theirs, exact)


def test_as_the_books_logits_say(path):
    _check(*_models(), _texts())


def _hook(model):
    model.trf_blocks[0].att.register_forward_hook(lambda *_: None)


def _bias(model):
    head = nn.Linear(48, 61)
    head.weight = model.out_head.weight
    head.bias.data.zero_()
    model.out_head = head


def _wrapped_head(model):
    model.out_head = nn.Sequential(model.out_head)


@pytest.mark.parametrize("change", [_hook, _bias, _wrapped_head])
def test_other_models(change):
    ours, book = _models()
    change(ours)
    _check(ours, book, _texts())


def test_the_books_model():
    _, book = _models()
    with pytest.raises(ValueError, match="context_size is needed"):
        fastgpt.score(book, [[1, 2]])
    (got,) = fastgpt.score(book, [[1, 2, 3]], CONTEXT)
    assert torch.equal(got, _one_by_one(book, [1, 2, 3]))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_heads_hold_few_logits(precision, monkeypatch):
    model = quantized(precision)
    most = []
    whole = scoring._cross_entropy
    monkeypatch.setattr(scoring, "_MOST_LOGITS", 20)
    monkeypatch.setattr(scoring, "_cross_entropy", lambda x, y: most.append(len(x)) or whole(x, y))
    texts = [[1, 2, 3, 4, 5, 6]] * 9
    got = fastgpt.score(model, texts)
    assert 5 <= max(most) <= 20
    for one in got:
        torch.testing.assert_close(one, _one_by_one(model, texts[0]), rtol=1e-4, atol=0.02)


def test_16_bits():
    ours, _ = _models()
    texts = _texts()
    expected = torch.cat(fastgpt.score(ours, texts))
    got = torch.cat(fastgpt.score(ours.bfloat16(), texts))
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("stride", [1, 5, 12, 24])
@pytest.mark.parametrize("tokens", [24, 25, 26, 48, 49, 61, 100])
def test_long_texts_by_windows_that_overlap(stride, tokens):
    """The usual convention, written out."""
    ours, book = _models()
    ids = torch.randint(0, 61, (tokens,))
    (got,) = fastgpt.score(ours, [ids], stride=stride)
    expected = []
    for begin in range(0, tokens, stride):
        end = min(begin + CONTEXT, tokens - 1)
        every = _one_by_one(book, ids[begin : end + 1].tolist())
        expected += every[len(expected) - begin :].tolist()
        if end == tokens - 1:
            break
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_a_default_stride_of_half_the_context():
    ours, _ = _models()
    ids = list(range(60))
    assert torch.equal(*(fastgpt.score(ours, [ids], stride=s)[0] for s in (None, CONTEXT // 2)))


def test_each_text_is_as_alone():
    """Bit for bit, duplicates and neighbours whatever they are."""
    ours, _ = _models()
    texts = _texts(40)
    together = fastgpt.score(ours, texts + texts[::-1])
    for text, one, again in zip(texts, together, together[::-1], strict=False):
        assert torch.equal(one, again)
        assert torch.equal(one, fastgpt.score(ours, [text])[0])


@pytest.mark.parametrize("tokens", [134, 70, 160])
def test_windows_of_a_long_text_beside_short_ones(tokens):
    """A pass of short texts may take the last window, which is short too, before the first."""
    ours, _ = _models(context_length=64)
    texts = [[1, 2, 3], some_ids(B=1, T=tokens)[0].tolist(), list(range(40)), [4, 5]]
    for stride in (16, 64):
        for text, one in zip(texts, fastgpt.score(ours, texts, stride=stride), strict=True):
            assert torch.equal(one, fastgpt.score(ours, [text], stride=stride)[0])


@pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing))
def test_several_in_a_pass(monkeypatch):
    ours, _ = _models()
    passes = []
    run = rows.WholePass.run_packed
    monkeypatch.setattr(
        rows.WholePass, "run_packed", lambda *a, **k: passes.append(1) or run(*a, **k)
    )
    fastgpt.score(ours, [[1, 2, 3]] * 30)
    assert 0 < len(passes) < 10


BAD = [
    ({"sequences": [[1, 2], []]}, ValueError, "text 1 holds no token"),
    ({"sequences": [[1, 2.5]]}, TypeError, "text 0 must hold integers"),
    ({"sequences": [[1, 61, 2]]}, IndexError, "token id 61"),
    ({"sequences": [[1, 2, 61]]}, IndexError, "61"),
    ({"sequences": [[1, 2, -100]]}, IndexError, "token id -100"),
    ({"sequences": ["ab"]}, TypeError, "text 0 must hold integers"),
    ({"sequences": [[1 << 70]]}, TypeError, "text 0 must hold integers of at most 64 bits"),
    ({"sequences": [5]}, TypeError, "text 0 must hold integers"),
    ({"context_size": 0}, ValueError, "context_size 0"),
    ({"context_size": 25}, ValueError, "context_size 25"),
    ({"stride": 0}, ValueError, "stride 0 is not from 1 to the context_size 24"),
    ({"stride": 25}, ValueError, "stride 25"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments(arguments, error, message):
    ours, _ = _models()
    with pytest.raises(error, match=message):
        fastgpt.score(ours, **({"sequences": [[1, 2]]} | arguments))


def test_nothing_to_score():
    ours, _ = _models()
    assert fastgpt.score(ours, []) == []
    assert [len(one) for one in fastgpt.score(ours, [[1], [2]])] == [0, 0]


@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
def test_scores_and_losses_are_float32_whatever_the_head_is():
    """Logits of a head with a bias are held, in the model's dtype."""
    model, ids = pair()[0].to(torch.bfloat16), some_ids()
    model.out_head = torch.nn.Linear(48, 61, dtype=torch.bfloat16)
    for path in ("auto", "reference"):
        with fastgpt.use_backend(path):
            assert model.loss(ids, ids).dtype == torch.float32
            assert fastgpt.score(model, ids)[0].dtype == torch.float32
