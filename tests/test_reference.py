"""fastgpt.reference, and fastgpt itself, against the package that comes with the book."""

import pytest
import torch
from pairs import CONFIG, assert_same, outputs_and_grads, some_ids

import fastgpt
from fastgpt import reference

book = pytest.importorskip("llms_from_scratch.ch04", reason="the book's package isn't installed")
pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")

BOTH = pytest.mark.parametrize("module", [reference, fastgpt], ids=["reference", "fastgpt"])
CONFIGS = pytest.mark.parametrize("qkv_bias", [False, True], ids=["plain", "qkv_bias"])


def build(module, **changes):
    torch.manual_seed(123)
    return module.GPTModel({**CONFIG, "drop_rate": 0.1, **changes})


@BOTH
@CONFIGS
def test_the_same_weights_and_generator_state(module, qkv_bias):
    right = build(book, qkv_bias=qkv_bias)
    right_state = torch.get_rng_state()
    model = build(module, qkv_bias=qkv_bias)
    assert torch.equal(torch.get_rng_state(), right_state)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in right.named_parameters()]
    ours, theirs = model.state_dict(), right.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@CONFIGS
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_reference_repeats_the_book_bit_for_bit(qkv_bias, training):
    results = []
    for module in (reference, book):
        model = build(module, qkv_bias=qkv_bias).train(training)
        results.append(outputs_and_grads(model, some_ids()))
        results[-1]["generator"] = torch.get_rng_state()
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


PARTS = {
    "LayerNorm": ("LayerNorm", (48,)),
    "GELU": ("GELU", ()),
    "FeedForward": ("FeedForward", (CONFIG,)),
    "MultiHeadAttention": ("MultiHeadAttention", (48, 80, 12, 0.0, 5)),
    "TransformerBlock": ("TransformerBlock", (CONFIG,)),
}


@pytest.mark.parametrize("part", PARTS)
@BOTH
def test_parts_agree(module, part):
    name, arguments = PARTS[part]
    results = []
    for source in (module, book):
        torch.manual_seed(123)
        results.append(outputs_and_grads(getattr(source, name)(*arguments), torch.randn(2, 9, 48)))
    assert_same(*results)


@BOTH
def test_greedy_tokens(module):
    right, model = build(book).eval(), build(module).eval()
    prompt, context = some_ids(T=4), CONFIG["context_length"]
    tokens = book.generate_text_simple(right, prompt, 40, context)  # slides past the context
    assert torch.equal(module.generate_text_simple(model, prompt, 40, context), tokens)
    assert torch.equal(module.generate_text_simple(right, prompt, 40, context), tokens)
    assert torch.equal(book.generate_text_simple(model, prompt, 40, context), tokens)


@BOTH
def test_state_dicts_load_both_ways(module):
    torch.manual_seed(5)
    right, model = book.GPTModel(CONFIG).eval(), module.GPTModel(CONFIG).eval()
    fresh = book.GPTModel(CONFIG).eval()
    model.load_state_dict(right.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert_same(model(some_ids()), right(some_ids()))
    assert torch.equal(fresh(some_ids()), right(some_ids()))
