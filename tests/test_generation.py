import pytest
import torch
from helpers import PATHS, use_path
from torch import nn

import fastgpt
from fastgpt import reference
from fastgpt.model.sampling import drawn as _drawn

CONFIG = {
    "vocab_size": 61,
    "context_length": 24,
    "emb_dim": 48,
    "n_heads": 3,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": True,
}


def _models(**changes):
    """Ours and the book's, with weights large enough that greedy tokens vary."""
    config = {**CONFIG, **changes}
    ours, book = fastgpt.GPTModel(config).eval(), reference.GPTModel(config).eval()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.dim() == 1:  # drawn anew, a norm's shift alone would choose the token
                p.add_(torch.randn_like(p) * 0.3)
            else:
                p.copy_(torch.randn_like(p) * (1.0 if "emb" in name else 0.3))
    book.load_state_dict(ours.state_dict())
    return ours, book


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize(("T", "new"), [(1, 8), (7, 17), (7, 30), (24, 5), (30, 4)])
def test_greedy_tokens_are_the_books(path, B, T, new):
    ours, book = _models()
    idx = torch.randint(0, 61, (B, T))
    for context_size in (24, 10, 1):
        expected = reference.generate_text_simple(book, idx, new, context_size)
        assert torch.equal(fastgpt.generate_text_simple(ours, idx, new, context_size), expected)


@pytest.mark.parametrize("options", [
    {},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 1.0, "top_k": 61, "eos_id": 7},
    {"top_k": 3, "eos_id": 11},
], ids=str)  # fmt: skip
def test_sampling_is_the_books_under_the_same_seed(path, options):
    ours, book = _models()
    for seed in range(5):
        idx = torch.randint(0, 61, (1, 6))
        torch.manual_seed(seed)
        expected = reference.generate(book, idx, 25, 24, **options)
        torch.manual_seed(seed)
        assert torch.equal(fastgpt.generate(ours, idx, 25, 24, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("B", [1, 8])
def test_draws_and_leaves_the_generator_as_multinomial(B, dtype):
    probabilities = torch.softmax(3 * torch.randn(B, 50257, dtype=dtype), dim=-1)
    probabilities[:, ::2] = 0
    for seed in range(20):
        torch.manual_seed(seed)
        expected = torch.multinomial(probabilities, 1), torch.rand(1)
        torch.manual_seed(seed)
        drawn = _drawn(probabilities), torch.rand(1)
        assert all(map(torch.equal, drawn, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-320])
@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
def test_a_tiny_temperature_takes_the_likeliest(dtype, temperature):
    ours = _models()[0].to(dtype)
    with torch.no_grad():
        ours.out_head.weight *= 50
    idx = torch.randint(0, 61, (2, 6))
    for options in ({}, {"top_k": 5}, {"top_p": 0.9}):
        drawn = fastgpt.generate(ours, idx, 1, 24, temperature=temperature, **options)
        likeliest = fastgpt.generate_text_simple(ours, idx, 1, 24)
        logits = ours(idx)[:, -1]
        if temperature < 1e-30:
            assert torch.equal(drawn, likeliest)
        assert torch.equal(logits.gather(1, drawn[:, -1:]), logits.amax(-1, keepdim=True))


@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
def test_half_precision_is_sampled_in_float32():
    ours = _models()[0].half()
    idx = torch.randint(0, 61, (1, 6)).expand(200, 6)
    drawn = fastgpt.generate(ours, idx, 1, 24, temperature=1e-6)  # 65504 is float16's largest
    assert drawn[:, -1].max() < 61
    torch.manual_seed(1)
    drawn = fastgpt.generate(ours, idx, 1, 24, temperature=0.9)
    torch.manual_seed(1)
    with torch.no_grad():  # of the last token alone, as float16 rounds a product of all otherwise
        logits = ours.forward_pass(idx, None, last_only=True)[:, -1]
    p = torch.softmax(logits.float() / 0.9, dim=-1)
    assert torch.equal(drawn[:, -1:], torch.multinomial(p, 1))


def test_a_huge_temperature_draws_evenly_from_the_top_k():
    ours, _ = _models()
    idx = torch.randint(0, 61, (1, 6)).expand(200, 6)
    drawn = fastgpt.generate(ours, idx, 1, 24, temperature=1e300, top_k=3)[:, -1]
    assert set(drawn.tolist()) == set(ours(idx[:1])[0, -1].topk(3).indices.tolist())


def test_logits_that_are_no_numbers_are_not_drawn_from():
    ours, _ = _models()
    with torch.no_grad():
        ours.final_norm.shift[3] = torch.nan
    with pytest.raises(RuntimeError, match="a logit of the model is NaN or infinite"):
        fastgpt.generate(ours, torch.tensor([[1, 2]]), 1, 24, temperature=1.0, top_k=4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_ids(dtype):
    ours, book = _models()
    idx = torch.randint(0, 61, (2, 5))
    expected = fastgpt.generate_text_simple(ours, idx, 4, 24)
    for model in (ours, book):
        assert torch.equal(fastgpt.generate_text_simple(model, idx.to(dtype), 4, 24), expected)
    steps = fastgpt.generate_stream(ours, idx.to(dtype), 4, 24)
    assert torch.equal(torch.cat(list(steps), dim=1), expected[:, 5:])
    loss = ours.loss(idx, idx)
    assert torch.equal(ours.loss(idx.to(dtype), idx.to(dtype)), loss)
    with pytest.raises(IndexError, match="target 61 is outside the vocabulary of 61"):
        ours.loss(idx, torch.full_like(idx, 61).to(dtype))


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    ours, _ = _models()
    idx = torch.randint(0, 61, (1, 6)).expand(400, 6)
    with torch.no_grad():
        likely, order = torch.softmax(ours(idx[:1])[0, -1], dim=-1).sort(descending=True)
    reached = likely.cumsum(0)
    keeps = 5
    top_p = ((reached[keeps - 2] + reached[keeps - 1]) / 2).item()
    drawn = fastgpt.generate(ours, idx, 1, 24, temperature=1.0, top_p=top_p)[:, -1]
    assert set(drawn.tolist()) == set(order[:keeps].tolist())
    for top_p in (1e-9, 1e-300):  # which is 0 in float32
        least = fastgpt.generate(ours, idx[:9], 4, 24, temperature=1.0, top_p=top_p)
        assert torch.equal(least, fastgpt.generate_text_simple(ours, idx[:9], 4, 24))


def test_a_batch_ends_when_every_row_has():
    ours, _ = _models()
    idx = torch.randint(0, 61, (4, 5))
    free = fastgpt.generate(ours, idx, 12, 24)
    eos = int(free[0, 8])
    ended = fastgpt.generate(ours, idx, 12, 24, eos_id=eos)
    for row, unbounded in zip(ended[:, 5:].tolist(), free[:, 5:].tolist(), strict=True):
        stop = unbounded.index(eos) if eos in unbounded else len(unbounded)
        assert row[:stop] == unbounded[: len(row)][:stop]
        assert set(row[stop:]) <= {eos}


def test_a_streams_reader_may_change_the_tokens():
    ours = fastgpt.GPTModel(CONFIG).eval()
    idx = torch.randint(0, 61, (2, 4))

    def tokens_seen(eos_id, change=7):
        seen = []
        torch.manual_seed(7)
        for new in fastgpt.generate_stream(ours, idx, 9, 24, temperature=1.0, eos_id=eos_id):
            seen.append(new.clone())
            new.add_(change).remainder_(61)
        return torch.cat(seen, dim=1)

    assert not torch.equal(tokens_seen(None), tokens_seen(None, change=0))
    assert torch.equal(tokens_seen(None), tokens_seen(61))  # which never comes


def test_stream_yields_as_it_goes_and_can_be_left():
    ours, _ = _models()
    idx = torch.randint(0, 61, (2, 4))
    whole = fastgpt.generate(ours, idx, 9, 24)
    calls = []
    stream = fastgpt.generate_stream(ours, idx, 9, 24)
    for i, new in enumerate(stream):
        calls.append(new)
        assert torch.equal(new, whole[:, 4 + i : 5 + i])
        if i == 3:
            stream.close()
            break
    assert len(calls) == 4
    assert torch.equal(fastgpt.generate(ours, idx, 9, 24), whole)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays(training):
    ours, _ = _models()
    ours.train(training)
    ours.trf_blocks[1].ff.train(not training)
    modes = [m.training for m in ours.modules()]
    fastgpt.generate_text_simple(ours, torch.tensor([[1, 2]]), 3, 24)
    assert [m.training for m in ours.modules()] == modes


def test_dropout_while_training_draws_as_in_the_book():
    ours, book = _models(drop_rate=0.3)
    ours.train(), book.train()
    idx = torch.randint(0, 61, (2, 5))
    torch.manual_seed(3)
    expected = reference.generate_text_simple(book, idx, 6, 24)
    torch.manual_seed(3)
    with fastgpt.use_backend("reference"):
        assert torch.equal(fastgpt.generate_text_simple(ours, idx, 6, 24), expected)
    torch.manual_seed(3)
    one = fastgpt.generate_text_simple(ours, idx, 6, 24)
    torch.manual_seed(3)
    assert torch.equal(fastgpt.generate_text_simple(ours, idx, 6, 24), one)


class Average(nn.Module):
    """Looks at all tokens before, so that feeding tokens one by one would be wrong."""

    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def _hooked(model, seen):
    model.trf_blocks[0].att.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))


@pytest.mark.parametrize("change", ["foreign", "hook", "module", "head", "mask", "forward"])
def test_surgery_takes_the_books_loop(change):
    ours, book = _models()
    seen = []
    for model in (ours, book):
        if change == "hook":
            _hooked(model, seen)
        elif change == "module":
            model.trf_blocks[1].ff = Average()
        elif change == "head":
            model.out_head = nn.Sequential(model.out_head, nn.Tanh())
        elif change == "mask":
            model.trf_blocks[0].att.mask = torch.zeros(24, 24)
        elif change == "forward":
            model.final_norm.forward = lambda x: x * 0.1
    idx = torch.randint(0, 61, (2, 5))
    expected = reference.generate_text_simple(book, idx, 30, 24)
    model = book if change == "foreign" else ours
    assert torch.equal(fastgpt.generate_text_simple(model, idx, 30, 24), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
def test_other_dtypes(dtype):
    ours, book = _models()
    ours, book = ours.to(dtype), book.to(dtype)
    idx = torch.randint(0, 61, (2, 5))
    got = fastgpt.generate_text_simple(ours, idx, 10, 24)
    if dtype is torch.float64:
        assert torch.equal(got, reference.generate_text_simple(book, idx, 10, 24))
    else:  # the two round differently: each token is nearly the likeliest, given those before
        logits = book.double()(got)[:, 4:-1]
        chosen = logits.gather(2, got[:, 5:, None])[..., 0]
        assert (logits.amax(-1) - chosen <= 0.05 * logits.std()).all()


def test_changed_weights_between_tokens_are_seen():
    """A stream reads the live parameters at every step."""
    ours, _ = _models()
    idx = torch.randint(0, 61, (1, 3))
    stream = fastgpt.generate_stream(ours, idx, 4, 24)
    next(stream)
    with torch.no_grad():
        ours.out_head.weight.zero_()
        ours.out_head.weight[42] = 1e3 * torch.sign(torch.randn(48))
        ours.final_norm.scale.zero_()
        ours.final_norm.shift.copy_(ours.out_head.weight[42])
    assert next(stream).item() == 42


def test_bad_arguments():
    ours, _ = _models()
    idx = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"temperature -1"):
        fastgpt.generate(ours, idx, 3, 24, temperature=-1)
    with pytest.raises(ValueError, match=r"top_k 0"):
        fastgpt.generate(ours, idx, 3, 24, top_k=0)
    for top_p in (0, 1.1):
        with pytest.raises(ValueError, match=rf"top_p {top_p}"):
            fastgpt.generate(ours, idx, 3, 24, temperature=1, top_p=top_p)
    for call in (
        ours,
        lambda one: ours.loss(one, one),
        lambda one: fastgpt.generate_text_simple(ours, one, 3, 24),
        lambda one: fastgpt.generate(ours, one, 3, 24),
        lambda one: fastgpt.generate_stream(ours, one, 3, 24),
    ):
        with pytest.raises(ValueError, match=r"got shape \(3,\); idx\[None\] makes"):
            call(idx[0])
    with pytest.raises(ValueError, match="no token to go on from"):
        fastgpt.generate(ours, idx[:, :0], 3, 24)
    with pytest.raises(ValueError, match="temperature nan"):
        fastgpt.generate(ours, idx, 3, 24, temperature=float("nan"))
    with pytest.raises(IndexError, match="61"):
        fastgpt.generate(ours, torch.tensor([[1, 61]]), 3, 24)
    with pytest.raises(ValueError, match=r"25 tokens.*24"):
        fastgpt.generate_text_simple(ours, idx, 40, 100)
    assert torch.equal(fastgpt.generate_text_simple(ours, idx, 0, 24), idx)


@pytest.mark.skipif(len(PATHS) < 2, reason="no C++ extension")
def test_the_head_sees_the_last_token_only(monkeypatch):
    ours, _ = _models()
    shapes = []
    whole = ours.forward_pass
    monkeypatch.setattr(
        ours, "forward_pass", lambda *a, **k: shapes.append((out := whole(*a, **k)).shape) or out
    )
    with use_path(PATHS[-1]):
        fastgpt.generate_text_simple(ours, torch.randint(0, 61, (2, 9)), 3, 24)
    assert shapes == [(2, 1, 61)] * 3
