"""Many prompts at once: each gets the tokens that it gets alone, whatever else is in the batch."""

import gc
import random
import weakref
from pathlib import Path

import pytest
import torch
from helpers import PATHS, use_path
from test_generation import _models
from torch import nn

import fastgpt
from fastgpt import cpu, reference
from fastgpt.model import rows

CONTEXT = 64
SETTINGS = [
    {"eos_id": 7},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 1.5, "eos_id": 7},
    {"temperature": 0.8, "top_p": 0.9},
]


def _model(kind="float32", **changes):
    ours, _ = _models(context_length=CONTEXT, **changes)
    if kind.startswith("int"):
        return fastgpt.quantize(ours, kind)
    return ours.to(getattr(torch, kind))


def _prompts(n, lengths=(1, 2, 5, 8, 9, 17, 31, 32, 33, 40, 63, 64, 70), seed=1):
    """Ragged, from one token to past the context, and each number of new tokens."""
    some = random.Random(seed)
    prompts = [[some.randrange(61) for _ in range(some.choice(lengths))] for _ in range(n)]
    return prompts, [some.randrange(0, 40) for _ in prompts]


def _alone(model, prompts, new, seed=5, context_size=CONTEXT, **options):
    found = []
    for i, (prompt, n) in enumerate(zip(prompts, new, strict=True)):
        torch.manual_seed(seed + i)
        idx = torch.tensor([prompt])
        found.append(fastgpt.generate(model, idx, n, context_size, **options)[0].tolist())
    return found


@pytest.fixture
def packed(monkeypatch):
    """How many sequences each pass took."""
    taken = []
    run = rows.PackedRows._run

    def counted(self, tokens, numbers):
        taken.append(len(tokens))
        return run(self, tokens, numbers)

    monkeypatch.setattr(rows.PackedRows, "_run", counted)
    return taken


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8"])
def test_each_prompt_gets_what_it_gets_alone(fused, packed, kind):
    _check(_model(kind), packed, {})


@pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing))
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_drawn_or_ended_too(packed, kind, options):
    with use_path(PATHS[-1]):
        _check(_model(kind), packed, options)


def _check(model, packed, options):
    prompts, new = _prompts(20)
    expected = _alone(model, prompts, new, **options)
    for batch_size in (1, 3, 32):
        got = fastgpt.generate_batch(model, prompts, new, seed=5, batch_size=batch_size, **options)
        assert got == expected
        assert max(packed) <= batch_size
    assert max(packed) > 3


@pytest.mark.parametrize("context_size", [1, 10, 64])
def test_a_context_of_any_size(fused, context_size):
    model = _model()
    prompts, new = _prompts(9)
    expected = _alone(model, prompts, new, context_size=context_size)
    assert fastgpt.generate_batch(model, prompts, new, context_size) == expected


def test_the_tokens_are_the_books(path):
    ours, book = _models(context_length=CONTEXT)
    prompts, new = _prompts(8)
    expected = [
        reference.generate_text_simple(book, torch.tensor([prompt]), n, CONTEXT)[0].tolist()
        for prompt, n in zip(prompts, new, strict=True)
    ]
    assert fastgpt.generate_batch(ours, prompts, new) == expected


def test_a_thousand_prompts_duplicates_and_one():
    model = _model()
    prompts, _ = _prompts(50, lengths=(1, 3, 8))
    many = fastgpt.generate_batch(model, prompts * 20, 4)
    assert many[:50] * 20 == many
    assert fastgpt.generate_batch(model, prompts[:1], 4) == many[:1]
    assert fastgpt.generate_batch(model, [], 4) == []
    assert fastgpt.generate_batch(model, prompts, 0) == prompts
    tensors = [torch.tensor(prompt, dtype=torch.int32) for prompt in prompts]
    assert fastgpt.generate_batch(model, tensors, 4) == many[:50]
    assert fastgpt.generate_batch(model, prompts, torch.tensor(4).numpy()[()]) == many[:50]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads):
    model = _model()
    prompts, new = _prompts(12)
    expected = fastgpt.generate_batch(model, prompts, new)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert fastgpt.generate_batch(model, prompts, new) == expected
    finally:
        torch.set_num_threads(before)


def test_one_that_ends_makes_room_for_the_next(fused, packed):
    model = _model()
    prompts = [[i] for i in range(9)]
    fastgpt.generate_batch(model, prompts, [20, 1, 1, 1, 20, 1, 1, 1, 20], batch_size=3)
    # 3 rows throughout: without the next in its place, each third prompt would run by itself.
    assert sum(packed) == 66  # one pass a token, the first from the prompt
    assert packed.count(1) < 30


def test_the_stream_yields_as_it_goes():
    model = _model()
    prompts, _ = _prompts(6, lengths=(3, 9))
    whole = fastgpt.generate_batch(model, prompts, 5)
    stream = fastgpt.generate_batch_stream(model, prompts, 5)
    first = [next(stream) for _ in prompts]
    assert sorted(first) == [(i, text[len(prompts[i])]) for i, text in enumerate(whole)]
    texts = [list(prompt) for prompt in prompts]
    for number, token in [*first, *stream]:
        texts[number].append(token)
    assert texts == whole


def test_without_a_seed_torchs_generator_decides():
    model = _model()
    prompts, new = _prompts(6)

    def run(**options):
        torch.manual_seed(3)
        return fastgpt.generate_batch(model, prompts, new, **options), torch.rand(1)

    assert run(temperature=1.0)[0] == run(temperature=1.0)[0]
    torch.manual_seed(3)
    assert torch.equal(run(temperature=1.0, seed=1)[1], torch.rand(1, generator=_seeded(3)))
    assert torch.equal(run()[1], torch.rand(1, generator=_seeded(3)))


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing))
def test_memory_is_bounded_and_given_back(monkeypatch):
    model = _model()
    made, most = [], [0]
    prefill = rows.PackedRows.prefill

    def watched(self, *args):
        logits = prefill(self, *args)
        caches = [sequence.cache for sequence in self._caches.values()]
        made.extend(map(weakref.ref, caches))
        held = sum(cache.nbytes for cache in caches)
        most[0] = max(most[0], held)
        gc.collect()
        alive = {id(ref()): ref().nbytes for ref in made if ref() is not None}
        assert sum(alive.values()) == held  # nothing of those that ended
        return logits

    monkeypatch.setattr(rows.PackedRows, "prefill", watched)
    prompts, new = _prompts(20, lengths=(5, 20))
    expected = fastgpt.generate_batch(model, prompts, new)
    unbounded, most[0] = most[0], 0
    limit = unbounded // 4
    assert fastgpt.generate_batch(model, prompts, new, cache_bytes=limit) == expected
    assert 0 < most[0] <= limit
    most[0] = 0
    assert fastgpt.generate_batch(model, prompts, new, cache_bytes=1) == expected  # one by one
    assert most[0] <= 2 * 2 * 48 * 4 * 60


def _hooked(model):
    model.trf_blocks[1].ff.register_forward_hook(lambda *_: None)


def _replaced(model):
    model.trf_blocks[0].ff = nn.Sequential(model.trf_blocks[0].ff)


def _edited_mask(model):
    mask = model.trf_blocks[0].att.mask.clone()
    mask[5, 2] = 1
    model.trf_blocks[0].att.set_mask(mask)


@pytest.mark.parametrize("change", [_hooked, _replaced, _edited_mask])
def test_other_models_go_one_by_one_and_say_so(change):
    model = _model()
    change(model)
    prompts, new = _prompts(5, lengths=(3, 9))
    expected = _alone(model, prompts, new, temperature=1.0)
    with pytest.warns(fastgpt.BackendWarning, match="one by one") as said:
        got = fastgpt.generate_batch(model, prompts, new, temperature=1.0, seed=5)
    assert got == expected
    assert len(said) == 1


def _column_major_table(model):
    table = model.tok_emb.weight
    table.data = table.data.t().contiguous().t()


@pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing))
def test_what_one_pass_cannot_read_is_said():
    model = _model()
    _column_major_table(model)
    expected = _alone(model, [[1, 2], [3]], [5, 5])
    with pytest.warns(fastgpt.BackendWarning, match="a parameter's dtype, layout or size"):
        assert fastgpt.generate_batch(model, [[1, 2], [3]], 5) == expected


def test_the_books_model_goes_one_by_one():
    _, book = _models(context_length=CONTEXT)
    prompts, new = _prompts(4, lengths=(3, 9))
    with pytest.raises(ValueError, match="context_size is needed"):
        fastgpt.generate_batch(book, prompts, new)
    with pytest.warns(fastgpt.BackendWarning, match=r"GPTModel is not a fastgpt\.GPTModel"):
        got = fastgpt.generate_batch(book, prompts, new, CONTEXT)
    assert got == _alone(book, prompts, new)


@pytest.mark.parametrize("at", [0, 3, 20])
def test_a_change_in_the_middle_is_seen(at):
    """Weights at the next pass; a hook ends the batch, and the rest goes one by one."""

    def run(change):
        torch.manual_seed(0)
        model = _model()
        texts = [[1, 2, 3], [4, 5], [6]]
        stream = fastgpt.generate_batch_stream(model, texts, 10)
        for i, (number, token) in enumerate(stream):
            texts[number].append(token)
            if i == at and change:
                change(model)
        return texts

    def new_head(model):
        with torch.no_grad():
            model.out_head.weight.zero_()
            model.out_head.weight[11] = 1
            model.final_norm.scale.zero_()
            model.final_norm.shift.fill_(1)

    changed = run(new_head)
    assert all(text[-1] == 11 for text in changed)
    with pytest.warns(fastgpt.BackendWarning, match="one by one"):
        assert run(_hooked) == run(None)


def test_the_mode_and_gradients_stay():
    model = _model().train()
    prompts, _ = _prompts(4, lengths=(3, 9))
    stream = fastgpt.generate_batch_stream(model, prompts, 3)
    next(stream)
    assert torch.is_grad_enabled()
    assert model.training
    assert all(p.grad is None for p in model.parameters())


BAD = [
    ({"prompts": [[1], []]}, ValueError, "prompt 1 holds no token"),
    ({"prompts": [[1], [2.5]]}, TypeError, "prompt 1 must hold integers"),
    ({"prompts": [[[1]]]}, ValueError, r"prompt 0 .* one sequence .*\(1, 1\)"),
    ({"prompts": [[1], [61]]}, IndexError, "token id 61 is outside the vocabulary of 61"),
    ({"prompts": [[-1]]}, IndexError, "token id -1"),
    ({"max_new_tokens": [1, 2, 3]}, ValueError, "3 numbers for 1 prompts"),
    ({"context_size": 0}, ValueError, "context_size 0"),
    ({"context_size": 100, "max_new_tokens": 90}, ValueError, r"91 tokens of prompt 0 .* 64"),
    ({"batch_size": 0}, ValueError, "batch_size 0 is below 1"),
    ({"cache_bytes": 0}, ValueError, "cache_bytes 0 is below 1"),
    ({"temperature": -1.0}, ValueError, "temperature -1"),
    ({"top_k": 0}, ValueError, "top_k 0"),
    ({"top_p": 0.0}, ValueError, "top_p 0"),
    ({"temperature": 1.0, "seed": 1 << 64}, ValueError, "seed .* leaves no seed of 64 bits"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments_are_refused_before_anything_runs(arguments, error, message, packed):
    arguments = {"prompts": [[1, 2]], "max_new_tokens": 3} | arguments
    for function in (fastgpt.generate_batch, fastgpt.generate_batch_stream):
        with pytest.raises(error, match=message):
            function(_model(), **arguments)
    assert not packed


def test_a_model_without_blocks():
    ours, book = _models(context_length=CONTEXT, n_layers=0)
    with pytest.warns(fastgpt.BackendWarning, match="no blocks"):
        got = fastgpt.generate_batch(ours, [[1, 2]], 5)
    assert got[0] == reference.generate_text_simple(book, torch.tensor([[1, 2]]), 5, 64)[0].tolist()


def test_autocast(fused):
    model = _model()
    prompts, new = _prompts(10)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastgpt.generate_batch(model, prompts, new) == _alone(model, prompts, new)


def _trained():
    """A model that has read a story, byte by byte."""
    ids = torch.tensor(list((Path(__file__).parents[1] / "examples/story.txt").read_bytes())) % 61
    model = _model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        starts = torch.arange(16) * 200 + step
        windows = torch.stack([ids[at : at + 33] for at in starts.tolist()])
        optimizer.zero_grad()
        model.loss(windows[:, :-1], windows[:, 1:]).backward()
        optimizer.step()
    return model.eval(), ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_model(dtype, packed):
    """Whose texts go round, end at once and never, and stand there twice."""
    model, ids = _trained()
    model = model.to(dtype)
    prompts = [ids[at : at + n].tolist() for at, n in ((0, 30), (50, 1), (70, 9), (90, 64))]
    prompts += prompts
    for options in ({}, {"temperature": 0.7}):
        expected = _alone(model, prompts, [40] * 8, prompt_lookup=False, **options)
        assert _alone(model, prompts, [40] * 8, **options) == expected
        assert fastgpt.generate_batch(model, prompts, 40, seed=5, **options) == expected
    greedy = _alone(model, prompts, [40] * 8)
    assert greedy[:4] == greedy[4:]
    first = greedy[0][30]
    assert fastgpt.generate_batch(model, prompts[:1], 40, eos_id=first) == prompts[:1]
    never = next(token for token in range(61) if not any(token in text for text in greedy))
    assert fastgpt.generate_batch(model, prompts, 40, eos_id=never) == greedy
