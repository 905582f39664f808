"""Guess and check: the tokens of the plain loop, in fewer passes where a text repeats itself."""

import itertools
import time

import pytest
import torch
from helpers import PATHS, use_path
from test_generation import CONFIG, _models

import fastgpt
from fastgpt import cpu
from fastgpt.model import generation
from fastgpt.model.prompt_lookup import MOST, PromptLookup

pytestmark = pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing))
CONTEXT = 200


@pytest.fixture(autouse=True)
def _small_models_too(monkeypatch):
    monkeypatch.setattr(generation, "_LARGE", 0)
    with use_path(PATHS[-1]):
        yield


@pytest.fixture
def widths(monkeypatch):
    """How many tokens each pass took."""
    seen = []
    whole = fastgpt.GPTModel.forward_pass

    def forward_pass(self, idx, *args, **options):
        seen.append(idx.shape[1])
        return whole(self, idx, *args, **options)

    monkeypatch.setattr(fastgpt.GPTModel, "forward_pass", forward_pass)
    return seen


@pytest.fixture
def free(monkeypatch):
    """Every pass seems to take as long."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))


def _model(kind="float32"):
    ours, _ = _models(context_length=CONTEXT)
    if kind.startswith("int"):
        return fastgpt.quantize(ours, kind)
    return ours.to(getattr(torch, kind))


def _periodic_model():
    """Goes round: each token is followed by the next of ten."""
    ours = _model()
    with torch.no_grad():
        for p in ours.trf_blocks.parameters():
            p.zero_()
        ours.pos_emb.weight.zero_()
        ours.tok_emb.weight.copy_(torch.eye(61, 48))
        ours.final_norm.scale.fill_(1)
        ours.final_norm.shift.zero_()
        ours.out_head.weight.zero_()
        for i in range(10):
            ours.out_head.weight[(i + 1) % 10, i] = 9
    return ours


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("options", [
    {},
    {"temperature": 0.3},
    {"temperature": 1.0, "top_k": 3, "eos_id": 7},
    {"temperature": 0.8, "top_p": 0.7},
], ids=str)  # fmt: skip
def test_tokens_and_draws_are_those_of_the_plain_loop(free, widths, kind, options):
    ours = _model(kind)
    for seed in range(6):
        # Two letters: something like the last ones was always there before.
        idx = torch.randint(0, 2, (1, 30))
        torch.manual_seed(seed)
        plain = fastgpt.generate(ours, idx, 60, CONTEXT, **options, prompt_lookup=False)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(fastgpt.generate(ours, idx, 60, CONTEXT, **options), plain)
        assert torch.equal(torch.get_rng_state(), state)
    assert max(widths[1:]) > 1  # guesses were made


@pytest.mark.parametrize("new", [0, 1, 2, 5, 40, 190, 230])
def test_any_number_of_tokens_to_the_context_and_beyond(free, widths, new):
    ours, idx = _periodic_model(), torch.arange(10)[None]
    got = fastgpt.generate_text_simple(ours, idx, new, CONTEXT)
    assert torch.equal(got, (torch.arange(10 + new) % 10)[None])
    plain = fastgpt.generate_text_simple(ours, idx, new, CONTEXT, prompt_lookup=False)
    assert torch.equal(got, plain)


def test_a_text_that_repeats_takes_fewer_passes(free, widths):
    ours, idx = _periodic_model(), torch.arange(10)[None]
    fastgpt.generate_text_simple(ours, idx, 120, CONTEXT)
    assert len(widths) < 120 / 4
    assert max(widths[1:]) == MOST + 1
    widths.clear()
    fastgpt.generate_text_simple(ours, idx, 120, CONTEXT, prompt_lookup=False)
    assert widths == [10] + [1] * 119


def test_the_end_of_a_text_is_kept(free):
    ours, idx = _periodic_model(), torch.arange(10)[None].repeat(1, 3)
    got = fastgpt.generate(ours, idx, 50, CONTEXT, eos_id=7)
    assert got.shape == (1, 37)


def test_a_text_that_ends_before_the_context_is_not_guessed_past_it(free):
    ours = _periodic_model()
    idx = torch.arange(CONTEXT - 1)[None] % 10  # ends with 8
    got = fastgpt.generate(ours, idx, 50, 1000, eos_id=0)
    assert got[0, CONTEXT - 1 :].tolist() == [9]


def test_a_stream_stops_and_sees_changes_between_guessed_tokens(free, widths):
    ours, idx = _periodic_model(), torch.arange(10)[None].repeat(1, 3)
    stream = fastgpt.generate_stream(ours, idx, 50, CONTEXT)
    assert [next(stream).item() for _ in range(12)] == [i % 10 for i in range(12)]
    assert max(widths[1:]) > 1
    with torch.no_grad():  # now each is followed by the one before
        ours.out_head.weight[:10, :10] = ours.out_head.weight[:10, :10].clone().t()
    assert [next(stream).item() for _ in range(12)] == [(0 - i) % 10 for i in range(12)]
    ours.out_head.register_forward_hook(lambda *_: torch.eye(61)[5].expand(1, 1, 61))
    assert [next(stream).item() for _ in range(3)] == [5, 5, 5]


@pytest.mark.parametrize("seed", range(5))
def test_changes_at_any_token_are_as_without_guesses(free, seed):
    """The cache after a change is that of the plain loop too."""

    def run(prompt_lookup):
        torch.manual_seed(seed)
        ours, idx = _model(), torch.randint(0, 2, (1, 30))
        at = set(torch.randint(0, 50, (8,)).tolist())
        options = {"prompt_lookup": prompt_lookup, "temperature": 0.2}
        for i, new in enumerate(fastgpt.generate_stream(ours, idx, 50, CONTEXT, **options)):
            idx = torch.cat((idx, new), dim=1)
            if i in at:
                with torch.no_grad():
                    ours.trf_blocks[0].att.W_value.weight.mul_(1.01)
        return idx

    assert torch.equal(run(True), run(False))


def test_only_one_sequence_on_the_cpu_with_every_piece_fused_is_guessed_for(free, widths):
    ours = _periodic_model()
    fastgpt.generate_text_simple(ours, torch.arange(10)[None].repeat(2, 3), 20, CONTEXT)
    assert set(widths[1:]) == {1}
    widths.clear()
    ours.trf_blocks[0].norm1.eps = 1e-6  # a block of another kind
    fastgpt.generate_text_simple(ours, torch.arange(10)[None].repeat(1, 3), 20, CONTEXT)
    assert set(widths[1:]) == {1}


def test_a_small_model_is_not_guessed_for(free, widths, monkeypatch):
    monkeypatch.undo()
    seen = []
    monkeypatch.setattr(PromptLookup, "guess", lambda self, room: seen.append(room) or [])
    ours = fastgpt.GPTModel(CONFIG).eval()
    fastgpt.generate_text_simple(ours, torch.zeros(1, 8, dtype=torch.long), 10, 24)
    assert not seen


class _Clock:
    """Of a machine on which each guess lengthens a pass by `each` passes."""

    def __init__(self, monkeypatch, each):
        self.now, self.each = 0.0, each
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def run(self, lookup, tokens, steps):
        """What the model would choose is in `tokens`, [steps + some]."""
        done = 0
        while done < steps:
            guesses = lookup.guess(MOST)
            start = self.now
            self.now += 1 + self.each * len(guesses)
            lookup.passed(len(guesses), start)
            good = 0
            while good < len(guesses) and guesses[good] == tokens[done + good]:
                good += 1
            if guesses:
                lookup.checked(good)
            for token in tokens[done : done + good + 1]:
                lookup.add(token)
            done += good + 1
        return self.now


@pytest.mark.parametrize("each", [0.01, 0.03, 0.1, 0.5, 1.0])
def test_guesses_that_fail_cost_two_per_cent(monkeypatch, each):
    """Beside what is risked at the start."""
    # Pairs that were there before, never followed by the same.
    tokens = [t for i in range(3000) for t in (0, i + 1)]
    clock = _Clock(monkeypatch, each)
    assert clock.run(PromptLookup([0]), tokens, 5000) <= 5000 * 1.021 + 2


# At half a pass a guess, a credit of one pass bounds the gain by 3 tokens in 2, after a start.
@pytest.mark.parametrize(("each", "gain"), [(0.03, 5), (0.1, 4), (0.5, 1.45)])
def test_a_text_that_goes_round_gains(monkeypatch, each, gain):
    tokens = [i % 11 for i in range(2000)]
    clock = _Clock(monkeypatch, each)
    assert clock.run(PromptLookup(tokens[:11]), tokens[11:], 1000) <= 1001 / gain


def test_guesses():
    lookup = PromptLookup([5, 1, 2, 3, 4, 9, 1, 2, 3])
    assert lookup.guess(2) == [4, 9]  # what followed 1 2 3
    lookup.add(7)
    assert lookup.guess(2) == []  # never seen before
    lookup.add(9)
    assert lookup.guess(2) == [1, 2]  # what followed 9
    assert lookup.guess(0) == []
    assert PromptLookup([8, 8]).guess(2) == [8, 8]  # goes on from what it guessed
