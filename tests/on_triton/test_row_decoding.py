"""Sequences of different lengths in the rows of one decoder, with capturing replaced by running the
step: see conftest.py.
"""

import contextlib

import pytest
import torch
from helpers import assert_as_exact
from pairs import CONFIG, assert_same, pair, some_ids

import fastgpt
from fastgpt import dispatch, reference
from fastgpt.model import decode_graph, rows
from fastgpt.model.cache import KVCache
from fastgpt.quantized_weight import PRECISIONS
from on_triton.support.cases import DTYPE_IDS, DTYPES

pytestmark = pytest.mark.usefixtures("dispatched", "captures")
VOCABULARY, CONTEXT = CONFIG["vocab_size"], CONFIG["context_length"]


def _prompts(*lengths):
    return [some_ids(B=1, T=n, seed=n)[0].tolist() for n in lengths]


@contextlib.contextmanager
def _decoder(model, rows, steps=CONTEXT):
    with decode_graph.row_decoding(model, rows, steps) as decoder:
        assert decoder is not None
        yield decoder


class _Rows:
    """The sequences in a decoder's rows, by row, and their logits as they come."""

    def __init__(self, decoder):
        self.decoder, self.texts, self.logits = decoder, {}, {}

    def start(self, prompts, rows):
        logits = self.decoder.prefill(prompts, rows)
        assert logits.shape == (len(prompts), VOCABULARY)
        for row, prompt, one in zip(rows, prompts, logits, strict=True):
            self.texts[row], self.logits[row] = list(prompt), [one]

    def step(self, seed=0):
        """Adds a token to each row; to those without a sequence any token, of no use."""
        ids = some_ids(B=1, T=len(self.decoder.state.ids), seed=seed)[0]
        for row, one in enumerate(self.decoder.step(ids)):
            if row in self.texts:
                self.texts[row].append(int(ids[row]))
                self.logits[row].append(one.clone())

    def check(self, row, *models):
        """A row's logits are those of the whole text, by model or by ours, the book's and exact."""
        text, ours = torch.tensor([self.texts[row]]), torch.stack(self.logits[row])
        with torch.no_grad():
            whole = [model(text)[0, -len(ours) :] for model in models]
        if len(models) == 1:
            assert_same(ours, *whole)
        else:
            assert_as_exact(ours, *whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("head_dim", [16, 64, 80])
def test_rows_at_different_positions(dtype, head_dim):
    ours, book = pair(emb_dim=2 * head_dim, n_heads=2, n_layers=2)
    ours, book = ours.to(dtype), book.to(dtype)
    _, exact = pair(emb_dim=2 * head_dim, n_heads=2, n_layers=2)
    exact.load_state_dict(book.state_dict())  # the same numbers as in dtype
    exact = exact.double()
    with _decoder(ours, 5) as decoder:
        rows = _Rows(decoder)
        rows.start(_prompts(1, CONTEXT - 3, 7, 2), [3, 0, 4, 1])
        for i in range(3):
            rows.start([], [])
            rows.step(seed=i)
        assert decoder.state.position.tolist() == [CONTEXT, 5, 0, 4, 10]
        for row in (0, 1, 3, 4):
            rows.check(row, book, exact)


def test_a_row_ends_and_another_begins_while_the_others_go_on(captures):
    ours, book = pair()
    with _decoder(ours, 3) as decoder:
        rows = _Rows(decoder)
        rows.start(_prompts(4, 9), [2, 0])
        rows.step()
        rows.check(2, book)
        decoder.release(2)
        del rows.texts[2]
        rows.step()
        assert decoder.state.position.tolist() == [11, 0, 0]
        rows.start(_prompts(3, 1), [2, 1])
        rows.step()
        rows.start(_prompts(2), [1])  # a row taken from the sequence that it holds
        rows.step()
        for row in range(3):
            rows.check(row, book)
    assert len(captures) == 1


def test_a_row_without_a_sequence_changes_no_bit_of_the_others():
    ours, _ = pair()
    results = []
    for left in (0.0, torch.nan):
        with _decoder(ours, 3) as decoder:
            for cache in (c for both in decoder.state.caches for c in both):
                cache.fill_(left)
            logits = [decoder.prefill(_prompts(6, 2), [0, 2])]
            idle = 5 if left == 0 else 9
            for _ in range(3):
                logits.append(decoder.step(torch.tensor([7, idle, 8]))[[0, 2]])
            assert decoder.state.position.tolist() == [9, 0, 5]
            results.append(torch.stack(logits))
    assert torch.equal(*results)


def test_past_the_end_of_the_context_a_row_writes_nothing():
    ours, book = pair(n_layers=1)
    with _decoder(ours, 3) as decoder:
        rows = _Rows(decoder)
        rows.start(_prompts(CONTEXT, CONTEXT - 1, 2), [1, 0, 2])
        rows.step()
        rows.texts[1].pop(), rows.logits[1].pop()  # of a token behind the last
        for row in range(3):
            rows.check(row, book)
        del rows.texts[0], rows.texts[1]
        before = [cache[:2].clone() for cache in decoder.state.caches[0]]
        for _ in range(3):
            rows.step()
        rows.check(2, book)
        assert decoder.state.position.tolist() == [CONTEXT, CONTEXT, 6]
        after = [cache[:2] for cache in decoder.state.caches[0]]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantised_weights(precision):
    given, _ = pair(emb_dim=96, n_layers=1)
    given.out_head.weight = given.tok_emb.weight
    model = fastgpt.quantize(given.eval(), precision)
    with _decoder(model, 3) as decoder:
        rows = _Rows(decoder)
        rows.start(_prompts(5, CONTEXT), [2, 0])
        last = decoder.step(torch.tensor([1, 2, 3]))  # row 0 is past its end
        assert last.isfinite()[2].all()
        rows.texts[2].append(3)
        rows.logits[2].append(last[2].clone())
        with fastgpt.use_backend("reference"):
            for row in (0, 2):
                rows.check(row, model)


def test_a_prompt_from_an_ordinary_cache_fills_one_row():
    ours, book = pair()
    ids, cache = some_ids(B=1, T=6), KVCache(CONFIG["n_layers"])
    with torch.no_grad():
        ours(ids, cache=cache)
    with _decoder(ours, 3) as decoder:
        rows = _Rows(decoder)
        rows.start(_prompts(4), [0])
        decoder.state.fill(cache, 2)
        rows.texts[2], rows.logits[2] = ids[0].tolist(), []
        rows.step()
        for row in (0, 2):
            rows.check(row, book)


def test_parameters_are_read_live(captures):
    ours, book = pair(n_layers=1)
    with _decoder(ours, 2) as decoder:
        for factor in (1, -2):
            with torch.no_grad():
                for model in (ours, book):
                    model.trf_blocks[0].ff.layers[0].weight.mul_(factor)
            assert decoder.serves(ours)
            rows = _Rows(decoder)
            rows.start(_prompts(3, 5), [0, 1])
            rows.step()
            for row in range(2):
                rows.check(row, book)
        ours.out_head.weight.data = ours.out_head.weight.data.clone()
        assert not decoder.serves(ours)
    assert len(captures) == 1


def test_rows_and_batches_of_one_length_share_a_graph(captures):
    ours, book = pair(n_layers=1)
    ids = some_ids(B=2, T=3)
    with _decoder(ours, 2) as decoder:
        decoder.prefill(_prompts(9, 4), [0, 1])
    mine = fastgpt.generate_text_simple(ours, ids, 5, CONTEXT)
    assert torch.equal(mine, reference.generate_text_simple(book, ids, 5, CONTEXT))
    with _decoder(ours, 2) as again:
        assert again is decoder
        assert again.state.position.tolist() == [0, 0]
    assert len(captures) == 1


@pytest.mark.parametrize(
    ("prompts", "rows", "error", "message"),
    [
        ([[1], []], [0, 1], ValueError, "a prompt has 0 tokens, the model takes 1 to 32"),
        ([[1] * 33], [0], ValueError, "a prompt has 33 tokens, the model takes 1 to 32"),
        ([[1], [2]], [0], ValueError, r"2 prompts need as many of the 3 rows, got \[0\]"),
        ([[1], [2]], [1, 1], ValueError, r"2 prompts .* got \[1, 1\]"),
        ([[1]], [3], ValueError, r"got \[3\]"),
        ([[1]], [-1], ValueError, r"got \[-1\]"),
        ([[1], [2, VOCABULARY]], [0, 1], IndexError, "token id 61 is outside"),
        ([[-1]], [0], IndexError, "token id -1 is outside"),
        ([[2**40]], [0], IndexError, "is outside"),
    ],
)
def test_bad_prompts_change_nothing(prompts, rows, error, message):
    ours, book = pair(n_layers=1)
    with _decoder(ours, 3) as decoder:
        sound = _Rows(decoder)
        sound.start(_prompts(5, 2), [0, 1])
        with pytest.raises(error, match=message):
            decoder.prefill(prompts, rows)
        sound.step()
        for row in (0, 1):
            sound.check(row, book)


def test_none_where_no_graph_can_serve(captures, monkeypatch):
    ours, _ = pair(n_layers=1)
    with decode_graph.row_decoding(ours, 2, decode_graph.MIN_STEPS - 1) as decoder:
        assert decoder is None
    with fastgpt.use_backend("reference"), decode_graph.row_decoding(ours, 2, 9) as decoder:
        assert decoder is None
    for change in (_without_packed_prompts, _modified):
        with monkeypatch.context() as patch:
            change(ours, patch)
            with decode_graph.row_decoding(ours, 2, 9) as decoder:
                assert decoder is None
    assert captures == []


def _without_packed_prompts(model, patch):
    patch.setitem(dispatch._failed, ("causal_attention", None), "does not compile")


def _modified(model, patch):
    model.final_norm.register_forward_hook(lambda module, args, out: -out)


def test_a_kernel_for_packed_prompts_that_does_not_run(monkeypatch):
    """Whoever generates starts again without a decoder; batches of one length keep their graphs."""
    monkeypatch.setattr(dispatch, "_failed", {})
    ours, _ = pair(n_layers=1)
    launchers = dispatch.module("triton", "causal_attention", ours.pos_emb.weight)

    def fails(*args, **kwargs):
        dispatch._failed["causal_attention", None] = "does not compile"
        raise dispatch.KernelError("does not compile")

    monkeypatch.setitem(vars(launchers), "causal_attention", fails)
    tries = []

    @dispatch.falls_back
    def generate():
        with decode_graph.row_decoding(ours, 2, 9) as decoder:
            tries.append(decoder is not None)
            return None if decoder is None else decoder.prefill([[1]], [0])

    assert generate() is None
    assert tries == [True, False]
    cache = KVCache(1)
    cache.update(0, tuple(torch.zeros(2, CONFIG["n_heads"], 3, 16) for _ in range(2)))
    with decode_graph.decoding(ours, cache, 9) as decoder:
        assert decoder is not None


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 9}, {"eos_id": 7}], ids=str)
def test_generate_batch_goes_by_rows(monkeypatch, options):
    """Each prompt gets what it gets alone; more prompts than rows, some past the context."""
    ours, _ = pair()
    ours.eval()
    used = []
    prefill = rows.GraphRows.prefill
    monkeypatch.setattr(
        rows.GraphRows, "prefill", lambda self, *a: used.append(len(a[0])) or prefill(self, *a)
    )
    lengths = [3, CONTEXT, 1, 7, CONTEXT - 2, 2, 5, CONTEXT + 3]
    prompts, new = _prompts(*lengths), [9, 2, 12, 3, 5, 0, 10, 2]
    alone = []
    for i, (prompt, n) in enumerate(zip(prompts, new, strict=True)):
        torch.manual_seed(5 + i)
        idx = torch.tensor([prompt])
        alone.append(fastgpt.generate(ours, idx, n, CONTEXT, **options)[0].tolist())
    got = fastgpt.generate_batch(ours, prompts, new, batch_size=3, seed=5, **options)
    assert got == alone
    assert sum(used) == 6  # of eight, one wants no token and one is longer than the context
    assert max(used) == 3


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=str)
def test_generate_batch_without_a_kernel_goes_one_by_one(monkeypatch, options):
    ours, _ = pair()
    ours.eval()
    prompts = _prompts(3, 5)
    expected = fastgpt.generate_batch(ours, prompts, 9, seed=5, **options)

    def fails(*_):
        raise dispatch.KernelError

    monkeypatch.setattr(decode_graph.Decoder, "prefill", fails)
    assert fastgpt.generate_batch(ours, prompts, 9, seed=5, **options) == expected
