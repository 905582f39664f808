"""The variants of the model in the book's bonus material: a cache of the last `kv_window_size`
tokens (chapter 4), and no causal mask (chapter 6).
"""

import copy
import io
import json
import pickle

import pytest
import torch
from helpers import assert_as_exact
from pairs import CONFIG as WIDER
from pairs import assert_same, assert_same_model, pair, same_weights, some_ids, weigh
from test_forward import calls as calls  # how many blocks each call into C++ ran
from torch import nn

import fastgpt
from fastgpt import GPTModel, KVCache, reference
from fastgpt.weights import WeightsError

CONTEXT = 12
CONFIG = {**WIDER, "context_length": CONTEXT}


pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")

WINDOWS = [1, 2, 5, CONTEXT - 1, CONTEXT, CONTEXT + 8]


class Windowed:
    """A window over the cache, in plain PyTorch over the modules of a reference model: each piece
    sees itself and as many of the tokens before it as fit the window with it.
    """

    def __init__(self, book, window):
        self.book, self.window, self.seen = book, window, 0
        self.pairs = [None] * len(book.trf_blocks)

    def __call__(self, ids):
        positions = self.book.pos_emb.weight[self.seen :][: ids.shape[1]]
        x = self.book.tok_emb(ids) + positions
        for layer, block in enumerate(self.book.trf_blocks):
            x = x + self.attended(block.att, block.norm1(x), layer)
            x = x + block.ff(block.norm2(x))
        self.seen += ids.shape[1]
        return self.book.out_head(self.book.final_norm(x))

    def attended(self, att, x, layer):
        B, T, _ = x.shape
        heads = (B, T, att.num_heads, att.head_dim)
        q, *new = (w(x).view(heads).transpose(1, 2) for w in (att.W_query, att.W_key, att.W_value))
        old = self.pairs[layer] or [t[:, :, :0] for t in new]
        k, v = (torch.cat(both, dim=2)[:, :, -self.window :] for both in zip(old, new, strict=True))
        self.pairs[layer] = [k, v]
        last = torch.arange(self.seen + T)[-k.shape[2] :]
        hidden = att.mask.bool()[self.seen :][:T, last]
        context = reference.causal_attention(q, k, v, hidden)
        return att.out_proj(context.transpose(1, 2).reshape(B, T, -1))


def windowed(window, **changes):
    """(ours with this window, the oracle): models with the same weights, to generate with."""
    ours, book = pair(CONFIG, **changes)
    model = GPTModel({**ours.cfg, "kv_window_size": window}).eval()
    model.load_state_dict(ours.state_dict())
    return model, Windowed(book, window)


def fed(model, ids, piece):
    """The logits of ids fed in pieces to the model's own cache, or to the oracle's."""
    how = {"use_cache": True} if isinstance(model, nn.Module) else {}
    return torch.cat([model(part, **how) for part in ids.split(piece, dim=1)], dim=1)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_over_the_cache(path, window, B):
    check_window(window, B, torch.float32)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_in_bfloat16(window, B):
    check_window(window, B, torch.bfloat16)


def check_window(window, B, dtype):
    """Pieces of several sizes, with gradients and without, against float64."""
    ours, oracle = windowed(window)
    book, ids = oracle.book, some_ids(B, CONTEXT)
    ours.to(dtype)
    same, exact = copy.deepcopy(book).to(dtype), copy.deepcopy(book).to(dtype).double()
    for piece in sorted({1, (window + 1) // 2, min(window, CONTEXT)}):
        torchs, right = (fed(Windowed(m, window), ids, piece).detach() for m in (same, exact))
        for grad in (False, True):
            ours.reset_kv_cache()
            with torch.set_grad_enabled(grad):
                got = fed(ours, ids, piece)
            assert got.requires_grad == grad
            assert_as_exact(got.detach(), torchs, right, f"pieces of {piece}, gradients {grad}")


@pytest.mark.parametrize(("window", "piece"), [(5, 3), (4, 4), (7, 1)])
def test_gradients_through_the_window(path, window, piece):
    ours, oracle = windowed(window)
    ids = some_ids(2, 11)
    weigh(fed(ours, ids, piece)).backward()
    weigh(fed(oracle, ids, piece)).backward()
    for (name, p), q in zip(ours.named_parameters(), oracle.book.parameters(), strict=True):
        assert_same({name: p.grad}, {name: q.grad})


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 4, CONTEXT, CONTEXT + 8])
@pytest.mark.parametrize("length", [1, 4, 7, CONTEXT])
def test_a_cached_loop_of_the_readers_own(path, window, length):
    """Greedy tokens, the prompt in pieces of the window's size."""
    ours, oracle = windowed(window)
    prompt = some_ids(2, length)
    found = []
    for model in (ours, oracle):
        logits, ids = fed(model, prompt, ours.kv_window_size), prompt
        while ids.shape[1] < CONTEXT:
            ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
            logits = fed(model, ids[:, -1:], 1)
        found.append(ids)
    assert torch.equal(*found)


@torch.no_grad()
def test_a_full_window_is_still_one_call(calls):
    if not fastgpt.cpu.isas():
        pytest.skip("the C++ extension is missing")
    ours, oracle = windowed(4)
    with fastgpt.use_backend("cpu"):
        assert_same(fed(ours, some_ids(1, 9), 1), fed(oracle, some_ids(1, 9), 1))
    assert calls == [(2, True)] * 9


@torch.no_grad()
def test_the_cache_holds_no_more_than_the_window(path):
    ours, _ = windowed(5)
    fed(ours, some_ids(2, 11), 3)
    for keys, values in ours._own_cache.get_all():
        assert keys.shape == values.shape == (2, 3, 5, 16)
        assert keys.untyped_storage().nbytes() == 2 * 3 * 5 * 16 * 4


def test_the_default_is_the_whole_context():
    ours = pair(CONFIG)[0]
    assert ours.kv_window_size == CONTEXT
    ours.pos_emb = nn.Embedding(50, 48)
    assert ours.kv_window_size == 50


@torch.no_grad()
def test_another_window_in_the_middle(path):
    """A smaller one drops tokens, a larger one brings none back."""
    ours, book = pair(CONFIG)
    oracle, ids = Windowed(book, CONTEXT), some_ids(2, CONTEXT)
    for window, part in zip((CONTEXT, 3, 5), ids.split((5, 2, 5), dim=1), strict=True):
        ours.kv_window_size = oracle.window = window
        assert_same(fed(ours, part, 1), fed(oracle, part, 1))


@torch.no_grad()
def test_again_after_a_reset(path):
    ours, oracle = windowed(4)
    ids = some_ids(2, 10)
    right = fed(oracle, ids, 4)
    for _ in range(2):
        ours.reset_kv_cache()
        assert_same(fed(ours, ids, 4), right)
    with pytest.raises(ValueError, match=r"14 tokens \(10 of them seen before\) .* length 12"):
        fed(ours, some_ids(2, 4), 4)


@torch.no_grad()
def test_calls_without_the_cache_leave_it_alone(path):
    ours, oracle = windowed(4)
    ids = some_ids(2, 11)
    start, rest = ids[:, :7], ids[:, 7:]
    fed(ours, start, 4), fed(oracle, start, 4)
    whole = oracle.book(ids)
    assert_same(ours(ids), whole)
    cache = KVCache(2)
    assert_same(torch.cat([ours(part, cache=cache) for part in (start, rest)], dim=1), whole)
    generated = fastgpt.generate_text_simple(ours, start, 9, CONTEXT)
    assert torch.equal(generated, reference.generate_text_simple(oracle.book, start, 9, CONTEXT))
    assert_same(fed(ours, rest, 1), fed(oracle, rest, 1))


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_in_the_middle(path, copied):
    ours, oracle = windowed(4)
    start, left, right = some_ids(2, 7), some_ids(2, 5, seed=8), some_ids(2, 5, seed=9)
    fed(ours, start, 4), fed(oracle, start, 4)
    fork = copied(ours), copy.deepcopy(oracle)
    for (model, exact), ids in (((ours, oracle), left), (fork, right)):
        assert model.kv_window_size == 4
        assert_same(fed(model, ids, 1), fed(exact, ids, 1))


def hook(model):
    model.trf_blocks[1].att.W_key.register_forward_hook(lambda *_: None)


def watch_positions(model):
    model.pos_emb.register_forward_hook(lambda *_: None)


def own_block(model):
    model.trf_blocks[0].forward = model.trf_blocks[0].forward


def edit_masks(model):
    for block in model.trf_blocks:
        block.att.mask[5:, 2:9:3] = 1


@torch.no_grad()
@pytest.mark.parametrize("change", [hook, watch_positions, own_block, edit_masks])
@pytest.mark.parametrize("piece", [1, 3])
def test_surgery(path, change, piece):
    ours, oracle = windowed(5)
    change(ours)
    if change is edit_masks:
        change(oracle.book)
    ids = some_ids(2, CONTEXT)
    assert_same(fed(ours, ids, piece), fed(oracle, ids, piece))


@torch.no_grad()
def test_positions_go_on_without_a_block(path):
    ours, oracle = windowed(4, n_layers=0)
    assert_same(fed(ours, some_ids(2, 11), 3), fed(oracle, some_ids(2, 11), 3))


@pytest.mark.parametrize("bad", [0, -1, 2.0, None, "4"], ids=repr)
def test_no_such_window(bad):
    wrong = rf"kv_window_size {bad!r} is not a whole number of at least 1"
    with pytest.raises(ValueError, match=wrong):
        GPTModel({**CONFIG, "kv_window_size": bad})
    model = windowed(3)[0]
    with pytest.raises(ValueError, match=wrong):
        model.kv_window_size = bad
    assert model.kv_window_size == 3


class Failure(Exception):
    pass


def fail(*_):
    raise Failure("in the middle")


@torch.no_grad()
@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (some_ids(2, 5), ValueError, "5 tokens are more than the kv_window_size of 4: feed them"),
        (some_ids(2, 9), ValueError, "16 tokens .7 of them seen before. are more than the contex"),
        (some_ids(1, 2), ValueError, "a batch of 1 for a cache of batch 2"),
        (torch.full((2, 2), 61), IndexError, "token id 61 is outside"),
        (some_ids(2, 2).float(), TypeError, "integers"),
        (some_ids(2, 2), Failure, "in the middle"),
    ],
)
def test_an_error_leaves_the_window_as_it_was(path, ids, error, message):
    ours, oracle = windowed(4)
    fed(ours, some_ids(2, 7), 4), fed(oracle, some_ids(2, 7), 4)
    if error is Failure:
        handle = ours.trf_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(error, match=message):
        ours(ids, use_cache=True)
    if error is Failure:
        handle.remove()
    assert_same(fed(ours, some_ids(2, 5, seed=8), 2), fed(oracle, some_ids(2, 5, seed=8), 2))


@torch.no_grad()
def test_the_window_is_kept(tmp_path):
    pytest.importorskip("safetensors")
    ours, oracle = windowed(5)
    ids = some_ids(2, CONTEXT)
    fed(ours, ids, 5)  # a cache that must not be taken over
    ours.save_pretrained(tmp_path)
    quantized = fastgpt.quantize(ours, "int8")
    quantized.save_pretrained(tmp_path / "int8")
    loaded = GPTModel.from_pretrained(tmp_path)
    for model in (loaded, quantized, GPTModel.from_pretrained(tmp_path / "int8")):
        assert model.kv_window_size == 5
    assert_same(fed(loaded, ids, 5), fed(oracle, ids, 5))
    with pytest.raises(ValueError, match="6 tokens are more than the kv_window_size of 5"):
        quantized(ids[:, :6], use_cache=True)
    assert GPTModel.from_pretrained(tmp_path, {"kv_window_size": 9}).kv_window_size == 9
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "kv_window_size": 7}))
    assert GPTModel.from_pretrained(tmp_path).kv_window_size == 7
    with pytest.raises(WeightsError, match="kv_window_size 0 is not a whole number"):
        GPTModel.from_pretrained(tmp_path, {"kv_window_size": 0})
    oracle.book.kv_window_size = 6  # as the book's variant has it
    assert fastgpt.accelerate(oracle.book).kv_window_size == 6


class SeesAll(reference.MultiHeadAttention):
    """Without a mask, as the book's variant."""

    disable_causal_mask = True
    mask = None

    def forward(self, x):
        B, T, _ = x.shape
        heads = (B, T, self.num_heads, self.head_dim)
        parts = (self.W_query, self.W_key, self.W_value)
        q, k, v = (w(x).view(heads).transpose(1, 2) for w in parts)
        context = reference.causal_attention(q, k, v, torch.zeros(T, T, dtype=torch.bool))
        return self.out_proj(context.transpose(1, 2).reshape(B, T, -1))


def seeing_all(dtype=torch.float32, **changes):
    """(ours without a causal mask, the reference without one)."""
    causal, book = pair(CONFIG, **changes)
    ours = GPTModel(causal.cfg, disable_causal_mask=True)
    ours.load_state_dict(dict(causal.named_parameters()))
    for block in book.trf_blocks:
        del block.att.mask
        block.att.__class__ = SeesAll
    return ours.to(dtype), book.to(dtype)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False, "n_layers": 1}, {"n_layers": 0}])
def test_every_token_sees_all(path, changes):
    ours, book = seeing_all(**changes)
    for shape in ((1, 1), (3, 9), (2, CONTEXT)):
        assert_same_model(ours, book, some_ids(*shape))
    assert_same(ours.loss(some_ids(), some_ids()), book_loss(book))


def book_loss(book):
    return nn.functional.cross_entropy(book(some_ids()).flatten(0, 1), some_ids().flatten())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_see_all(dtype):
    ours, book = seeing_all(dtype)
    exact = copy.deepcopy(book).double()
    assert_as_exact(ours(some_ids()), book(some_ids()), exact(some_ids()))


def test_training_without_a_mask(path):
    ours, book = seeing_all()
    losses = []
    for model in (ours, book):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(5):
            ids = some_ids(4, 12, seed=step)
            loss = nn.functional.cross_entropy(model(ids)[:, -1], ids[:, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert_same(torch.stack(losses[:5]), torch.stack(losses[5:]))


def test_dropout_repeats_and_drops():
    model = GPTModel({**CONFIG, "drop_rate": 0.3}, disable_causal_mask=True)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(model(some_ids()))
    assert torch.equal(*found)
    assert not torch.equal(found[0], model(some_ids()))


def test_the_same_weights_under_the_same_seed():
    found = []
    for options in ({}, {"disable_causal_mask": True}):
        torch.manual_seed(5)
        found.append((GPTModel(CONFIG, **options), torch.get_rng_state()))
    assert same_weights(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_its_state_dict_has_no_mask():
    ours, book = seeing_all()
    assert list(ours.state_dict()) == list(book.state_dict())
    assert not hasattr(ours.trf_blocks[0].att, "mask")
    for assign in (False, True):
        again = GPTModel(CONFIG, disable_causal_mask=True)
        again.load_state_dict(ours.state_dict(), assign=assign)
        assert_same_model(again, book)
    causal = pair(CONFIG)[0].state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.* \"trf_blocks.0.att.mask\""):
        ours.load_state_dict(causal)
    ours.load_state_dict(causal, strict=False)
    assert_same_model(ours, book)
    pair(CONFIG)[0].load_state_dict(ours.state_dict())


def test_the_parts_take_it_too(path):
    ours, book = seeing_all()
    block = fastgpt.TransformerBlock(CONFIG, disable_causal_mask=True)
    block.load_state_dict(ours.trf_blocks[1].state_dict())
    x = torch.randn(2, 9, 48)
    assert_same(block(x), book.trf_blocks[1](x))
    att = fastgpt.MultiHeadAttention(48, 48, CONTEXT, 0.0, 3, True, True)
    att.load_state_dict(block.att.state_dict())
    assert_same(att(x), book.trf_blocks[1].att(x))


@torch.no_grad()
def test_more_positions_are_all_it_takes_for_a_longer_text(path):
    ours, book = seeing_all()
    with pytest.raises(ValueError, match="17 tokens are more than the context length 12"):
        ours(some_ids(2, 17))
    ours.pos_emb = book.pos_emb = nn.Embedding(17, 48)
    assert_same(ours(some_ids(2, 17)), book(some_ids(2, 17)))


@torch.no_grad()
def test_it_generates_by_the_whole_sequence(path):
    ours, book = seeing_all()
    for context in (CONTEXT, 6):
        right = reference.generate_text_simple(book, some_ids(2, 5), 12, context)
        assert torch.equal(fastgpt.generate_text_simple(ours, some_ids(2, 5), 12, context), right)
        assert torch.equal(fastgpt.generate(ours, some_ids(2, 5), 12, context), right)
        stream = fastgpt.generate_stream(ours, some_ids(2, 5), 12, context)
        assert torch.equal(torch.cat([some_ids(2, 5), *stream], dim=1), right)


def test_it_refuses_a_cache(path):
    ours, book = seeing_all()
    cache = KVCache(2)
    for how in ({"use_cache": True}, {"cache": cache}):
        with pytest.raises(ValueError, match="without a causal mask no cache can be used"):
            ours(some_ids(), **how)
    assert cache.get_all() == [None, None]
    assert_same_model(ours, book)


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [
    copy.deepcopy,
    save_and_load,
    lambda model: model.to(torch.float64).float(),
])  # fmt: skip
def test_copies_see_all(copied):
    ours, book = seeing_all()
    assert_same_model(copied(ours), book)


def test_others_made_of_it_see_all():
    ours, book = seeing_all()
    ids = some_ids()
    parameters = dict(ours.named_parameters())
    assert_same(torch.func.functional_call(ours, parameters, (ids,)), book(ids))
    with torch.no_grad():
        assert (fastgpt.quantize(ours, "int8")(ids) - book(ids)).abs().max() < 0.05
    assert_same_model(fastgpt.accelerate(book), book)
    with torch.device("meta"):
        empty = GPTModel(CONFIG, disable_causal_mask=True)
    empty.load_state_dict(ours.state_dict(), assign=True)
    assert_same(empty(ids), ours(ids))


def test_weights_of_a_causal_model(tmp_path):
    pytest.importorskip("safetensors")
    causal, _ = pair(CONFIG)
    ours, book = seeing_all()
    torch.save(causal.state_dict(), tmp_path / "model.pth")
    with torch.no_grad():
        ours.out_head.weight.zero_()
    fastgpt.load_weights(ours, tmp_path / "model.pth")
    assert_same_model(ours, book)
    with torch.no_grad():
        causal.out_head.weight.zero_()
        causal.trf_blocks[1].att.mask[5, 2] = 1
    torch.save(causal.state_dict(), tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"edited masks, .* none: trf_blocks.1.att.mask"):
        fastgpt.load_weights(ours, tmp_path / "model.pth")
    assert_same_model(ours, book)
    with pytest.raises(WeightsError, match=r"trf_blocks.0.att has no causal mask"):
        ours.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_it_is_explained(capsys):
    fastgpt.explain(seeing_all()[0])
    assert "in the way: trf_blocks.{0-1}.att: no causal mask" in capsys.readouterr().out
