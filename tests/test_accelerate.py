"""A fused model over the parameters of the book's model or Hugging Face's, whichever is trained."""

import copy
import importlib

import pairs
import pytest
import torch
from pairs import CONFIG, assert_same, assert_same_model, logits, pair, shake, some_ids
from torch import nn
from torch.nn import functional as F

import fastgpt
from fastgpt import reference

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")

BOOKS = {
    "reference": "fastgpt.reference.GPTModel",
    "book": "llms_from_scratch.ch04.GPTModel",
    "faster": "llms_from_scratch.ch04.GPTModelFast",
    "cached": "llms_from_scratch.kv_cache.gpt2.GPTModel",
}


def books(kind, **changes):
    module, _, name = BOOKS[kind].rpartition(".")
    module = pytest.importorskip(module, reason="the book's package isn't installed")
    torch.manual_seed(1)
    return shake(getattr(module, name)({**CONFIG, **changes}))


def hugging_face(**changes):
    """In train mode, without dropout."""
    rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return pairs.hugging_face(**{**rates, **changes}).train()


@pytest.fixture(params=["book", "faster", "hugging face", "hugging face, untied"])
def theirs(request):
    if request.param.startswith("hugging"):
        return hugging_face(tie_word_embeddings="untied" not in request.param)
    return books(request.param)


@pytest.mark.parametrize("kind", BOOKS)
@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
def test_the_books(path, kind, qkv_bias):
    book = books(kind, qkv_bias=qkv_bias)
    ours = fastgpt.accelerate(book)
    assert_same_model(ours, book) if kind != "faster" else assert_same(logits(ours), logits(book))
    assert ours.cfg == {**CONFIG, "qkv_bias": qkv_bias}
    if kind != "faster":
        assert all(p is q for p, q in zip(ours.parameters(), book.parameters(), strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hugging_faces(path, attention):
    theirs = hugging_face(attn_implementation=attention, layer_norm_epsilon=1e-3)
    ours = fastgpt.accelerate(theirs)
    assert_same(logits(ours), logits(theirs))
    with torch.no_grad():
        assert_same(logits(ours), logits(theirs))
    assert ours.out_head.weight is ours.tok_emb.weight is theirs.lm_head.weight
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()


def test_nothing_is_copied(theirs):
    ours = fastgpt.accelerate(theirs)
    held = {p.untyped_storage().data_ptr() for p in theirs.parameters()}
    assert {p.untyped_storage().data_ptr() for p in ours.parameters()} == held
    fresh = fastgpt.GPTModel(ours.cfg)
    fresh.load_state_dict(ours.state_dict())
    assert_same(logits(fresh), logits(theirs))


@pytest.mark.skipif(fastgpt.cpu.missing is not None, reason="no C++ extension")
def test_the_whole_pass_takes_it(theirs):
    ours = fastgpt.accelerate(theirs).eval()
    with torch.no_grad():
        whole = ours.whole_pass(some_ids())
    assert all(fields is not None for fields in whole._blocks)
    assert whole._end is not None


STEPS = [(a, b) for a in ("ours", "theirs") for b in ("ours", "theirs")]


@pytest.mark.parametrize(("backward", "step"), STEPS)
def test_training_either_trains_both(theirs, backward, step):
    alone, before = copy.deepcopy(theirs), logits(theirs).detach()
    models = {"ours": fastgpt.accelerate(theirs), "theirs": theirs}
    optimisers = [  # no Adam: it would make steps of the rounding in key biases' gradients
        torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1)
        for model in (models[step], alone)
    ]
    for seed in range(3):
        for model, stepped, optimiser in zip(
            (models[backward], alone), (models[step], alone), optimisers, strict=True
        ):
            optimiser.zero_grad()
            for part in (seed, seed + 10):  # two batches a step
                logits(model, some_ids(seed=part)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(stepped.parameters(), 0.5)
            optimiser.step()
    with torch.no_grad():
        right = logits(alone)
        assert not torch.allclose(before, right, atol=0.1)
        assert_same(logits(models["ours"]), right)
        assert_same(logits(theirs), right)
    assert_same(dict(theirs.named_parameters()), dict(alone.named_parameters()))


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradients_add_up_over_both_models(theirs):
    alone = copy.deepcopy(theirs)
    ours = fastgpt.accelerate(theirs)
    for seed, model in enumerate((ours, theirs, ours, theirs)):
        for m in (model, alone):
            logits(m, some_ids(seed=seed)).square().mean().backward()
    assert_same(grads(theirs), grads(alone), atol=1e-4)
    ours.zero_grad()
    theirs.zero_grad()
    alone.zero_grad()
    for m in (ours, alone):
        logits(m).square().mean().backward()
    assert_same(grads(theirs), grads(alone), atol=1e-4)


@pytest.mark.parametrize("zeroed", ["ours", "theirs"])
@pytest.mark.parametrize("to_none", [True, False])
def test_either_may_zero_the_gradients(theirs, zeroed, to_none):
    alone = copy.deepcopy(theirs)
    models = {"ours": fastgpt.accelerate(theirs), "theirs": theirs}
    for model in (*models.values(), *models.values()):
        models[zeroed].zero_grad(set_to_none=to_none)
        logits(model).square().mean().backward()
    logits(alone).square().mean().backward()
    assert_same(grads(theirs), grads(alone), atol=1e-4)


def test_once_more_gives_the_same_parameters(theirs):
    one, two = fastgpt.accelerate(theirs), fastgpt.accelerate(theirs)
    assert all(p is q for p, q in zip(one.parameters(), two.parameters(), strict=True))
    with torch.no_grad():
        for p in theirs.parameters():
            p.data = p.data.clone()
        three = fastgpt.accelerate(theirs)
        for p in theirs.parameters():
            p.mul_(1.5)
    assert_same(logits(three), logits(theirs))


def test_frozen_parameters_stay_frozen(theirs):
    for name, p in theirs.named_parameters():
        p.requires_grad_("c_attn" not in name and "att." not in name)
    ours = fastgpt.accelerate(theirs)
    assert not any(p.requires_grad for n, p in ours.named_parameters() if "att.W_" in n)
    logits(ours).sum().backward()
    frozen = [p for p in theirs.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)


def test_the_original_goes_away():
    theirs = hugging_face()
    right = logits(theirs).detach()
    ours = fastgpt.accelerate(theirs)
    del theirs
    assert_same(logits(ours), right)
    logits(ours).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_copies_stand_alone(theirs):
    ours = fastgpt.accelerate(theirs)
    twin, right = copy.deepcopy(ours), logits(ours).detach()
    with torch.no_grad():
        for p in theirs.parameters():
            p.zero_()
    assert_same(logits(twin), right)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_random_numbers_are_left_alone(theirs, training):
    theirs.train(training)
    part = next(m for m in theirs.modules() if isinstance(m, nn.Dropout))
    part.train(not training)
    state = torch.get_rng_state()
    ours = fastgpt.accelerate(theirs)
    assert ours.training == theirs.training == training
    assert part.training != training
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_rates():
    ours = fastgpt.accelerate(hugging_face(embd_pdrop=0.3, attn_pdrop=0.2, resid_pdrop=0.1))
    block = ours.trf_blocks[0]
    assert (ours.drop_emb.p, block.att.dropout.p, block.drop_shortcut.p) == (0.3, 0.2, 0.1)
    ours = fastgpt.accelerate(books("faster", drop_rate=0.4))
    block = ours.trf_blocks[1]
    assert (ours.drop_emb.p, block.att.dropout.p, block.drop_shortcut.p) == (0.4, 0.4, 0.4)


def test_replaced_layers_run_as_they_are_and_masks_are_honoured():
    _, book = pair()
    book.trf_blocks[0].att.W_query = nn.Sequential(book.trf_blocks[0].att.W_query, nn.Tanh())
    book.out_head = nn.Linear(48, 2)
    book.trf_blocks[1].att.mask[:, :4] = 0
    assert_same_model(fastgpt.accelerate(book), book)


def test_generation_and_saving(tmp_path):
    theirs = hugging_face().eval()
    ours = fastgpt.accelerate(theirs)
    tokens = fastgpt.generate_text_simple(ours, some_ids(T=4), 8, 32)
    assert torch.equal(
        tokens, reference.generate_text_simple(lambda i: logits(theirs, i), some_ids(T=4), 8, 32)
    )
    pytest.importorskip("safetensors", reason="needs safetensors")
    ours.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    assert_same(dict(again.named_parameters()), dict(theirs.named_parameters()), rtol=0, atol=0)


def test_compiled():
    theirs = hugging_face()
    alone = copy.deepcopy(theirs)
    compiled = torch.compile(fastgpt.accelerate(theirs), backend="aot_eager")
    for model in (compiled, alone):
        logits(model).square().mean().backward()
    assert_same(grads(theirs), grads(alone), atol=1e-4)
    torch.compiler.reset()


@pytest.fixture
def precision():
    """Sets what torch's products may round to, and puts it back."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_products_that_are_rounded_more(path, precision, monkeypatch):
    """As a GPU rounds them to TF32: 10 bits behind the first."""

    def rounded(x):
        return (x.view(torch.int32) + (1 << 12) & -1 << 13).view(torch.float32)

    def linear(x, weight, bias=None, exact=F.linear):
        return exact(rounded(x), rounded(weight), bias)

    same = importlib.import_module("fastgpt.model.accelerate")._same
    book = books("reference")
    with monkeypatch.context() as patch, fastgpt.use_backend("reference"):
        patch.setattr(F, "linear", linear)
        theirs = logits(book).detach()
    ours = logits(fastgpt.accelerate(book)).detach()
    precision("highest")
    with pytest.raises(TypeError, match="computes something else"):
        same("", theirs, ours, 1e-4)
    precision("high")
    same("", theirs, ours, 1e-4)
    with pytest.raises(TypeError, match="computes something else"):
        same("", theirs, ours * 1.02, 1e-4)


def test_ours_comes_back_as_it_is():
    ours, _ = pair()
    assert fastgpt.accelerate(ours) is ours


def set_at(model, path, value):
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, value)


def hook(path):
    return lambda m: m.get_submodule(path).register_forward_hook(lambda *_: None)


def put(path, value):
    return lambda m: set_at(m, path, value())


class Doubled(reference.MultiHeadAttention):
    def forward(self, x):
        return 2 * super().forward(x)


class NeedsTwo(reference.GPTModel):
    def forward(self, ids, more):
        return ids


def doubled():
    return Doubled(48, 48, 32, 0.0, 3, True)


BOOK_REFUSALS = {
    "activation": (put("trf_blocks.1.ff.layers.1", nn.ReLU), r"trf_blocks.1: the activation comp"),
    "exact gelu": (put("trf_blocks.1.ff.layers.1", nn.GELU), r"trf_blocks.1: the activation comp"),
    "an activation that learns": (
        put("trf_blocks.0.ff.layers.1", lambda: nn.Sequential(nn.GELU("tanh"), nn.PReLU())),
        r"trf_blocks.0: the activation has parameters",
    ),
    "a dropout": (put("drop_emb", nn.AlphaDropout), r"is a AlphaDropout, not nn.Dropout"),
    "rms norm": (put("final_norm", lambda: nn.RMSNorm(48)), r"the final norm is a RMSNorm without"),
    "attention": (put("trf_blocks.1.att", doubled), r"trf_blocks.1.att computes something else"),
    "positions": (put("pos_emb", nn.Identity), r"position embedding is a Identity, not nn.Embed"),
    "a part more": (put("trf_blocks.0.moe", nn.Identity), r"trf_blocks.0 has also moe"),
    "a part less": (lambda m: delattr(m, "final_norm"), r"GPTModel has no final_norm"),
    "a parameter": (
        put("trf_blocks.0.gamma", lambda: nn.Parameter(torch.ones(1))),
        r"trf_blocks.0 has also gamma",
    ),
    "a forward with more": (lambda m: setattr(m, "__class__", NeedsTwo), r"alone: .*'more'"),
    "a hook": (hook("trf_blocks.1.norm2"), r"trf_blocks.1: the second norm has a hook"),
    "a hook on the stack": (hook("trf_blocks"), r"^trf_blocks has a hook"),
    "a hook on top": (hook(""), r"GPTModel has a hook"),
    "a forward": (put("trf_blocks.0.ff.forward", lambda: abs), r"trf_blocks.0.ff has a forward"),
    "heads": (put("trf_blocks.1.att.num_heads", lambda: 2), r"one number in all blocks.*\[3, 2\]"),
}


@pytest.mark.parametrize("change", BOOK_REFUSALS)
def test_refused_of_the_books(change):
    alter, message = BOOK_REFUSALS[change]
    _, book = pair()
    alter(book)
    before = {name: p.grad for name, p in book.named_parameters()}
    with pytest.raises(TypeError, match=message):
        fastgpt.accelerate(book)
    assert before == {name: p.grad for name, p in book.named_parameters()}
    assert book.training


THEIR_REFUSALS = {
    "activation": ({"activation_function": "relu"}, None, r"activation_function 'relu'"),
    "scaling": ({"scale_attn_by_inverse_layer_idx": True}, None, r"inverse_layer_idx True"),
    "width": ({"n_inner": 100}, None, r"n_inner 100"),
    "a linear": (
        {},
        put("transformer.h.1.mlp.c_fc", lambda: nn.Linear(48, 192)),
        r"transformer.h.1.mlp.c_fc is a Linear, not a Conv1D",
    ),
    "activation module": (
        {},
        put("transformer.h.1.mlp.act", nn.ReLU),
        r"transformer.h.1: the activation computes something else",
    ),
    "a hook": ({}, hook("transformer.h.0.attn"), r"transformer.h.0.attn has a hook"),
    "dropout": (
        {},
        put("transformer.h.0.mlp.dropout.p", lambda: 0.5),
        r"mlp.dropout is 0.5, transformer.h.0.attn.resid_dropout 0.0",
    ),
    "another head": ({}, put("score", lambda: nn.Linear(2, 2)), r"GPT2LMHeadModel has also score"),
}


@pytest.mark.parametrize("change", THEIR_REFUSALS)
def test_refused_of_hugging_faces(change):
    settings, alter, message = THEIR_REFUSALS[change]
    theirs = hugging_face(**settings)
    if alter:
        alter(theirs)
    with pytest.raises(TypeError, match=message):
        fastgpt.accelerate(theirs)


def test_something_else_is_refused():
    with pytest.raises(TypeError, match=r"Sequential is neither the book's GPTModel .*it has 0, 1"):
        fastgpt.accelerate(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    theirs = hugging_face()
    with pytest.raises(TypeError, match=r"GPT2Model is neither"):
        fastgpt.accelerate(theirs.transformer)


def test_the_function_and_its_module():
    assert importlib.import_module("fastgpt.model.accelerate").accelerate is fastgpt.accelerate
