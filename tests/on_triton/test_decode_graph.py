"""Generation by captured steps, with capturing replaced by running the step: see conftest.py."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from pairs import CONFIG, pair, some_ids

import fastgpt
from fastgpt import dispatch, reference
from fastgpt.model import decode_graph
from fastgpt.model.cache import idle
from fastgpt.quantized_weight import PRECISIONS

pytestmark = pytest.mark.usefixtures("dispatched", "captures")


def _same(ours, book, ids, new, context=CONFIG["context_length"]):
    mine = fastgpt.generate_text_simple(ours, ids, new, context)
    assert torch.equal(mine, reference.generate_text_simple(book, ids, new, context))


def test_the_books_tokens(captures):
    ours, book = pair()
    _same(ours, book, some_ids(B=2, T=3), 5)
    _same(ours, book, some_ids(B=2, T=5, seed=3), 5)  # the same graph from another position
    assert len(captures) == 1
    _same(ours, book, some_ids(B=1, T=3), 5)
    assert len(captures) == 2  # one a batch size


def test_up_to_the_context_and_past_it(captures):
    ours, book = pair(context_length=12, n_layers=1)
    _same(ours, book, some_ids(B=1, T=3), 11, 12)
    _same(ours, book, some_ids(B=1, T=3), 8, 9)
    assert len(captures) == 1
    with pytest.raises(ValueError, match=r"13 tokens.* context length 12"):
        fastgpt.generate_text_simple(ours, some_ids(B=1, T=3), 14, 20)


def test_parameters_are_read_live(captures):
    ours, book = pair(n_layers=1)
    ids = some_ids(B=1, T=3)
    _same(ours, book, ids, 5)
    with torch.no_grad():
        for model in (ours, book):
            model.out_head.weight.data.copy_(model.out_head.weight.flip(0))
            model.trf_blocks[0].ff.layers[0].weight.mul_(-2)
    _same(ours, book, ids, 5)
    assert len(captures) == 1


def test_replaced_parameters_are_captured_anew(captures):
    ours, book = pair(n_layers=1)
    ids = some_ids(B=1, T=3)
    _same(ours, book, ids, 5)
    for model in (ours, book):
        flipped = model.out_head.weight.detach().flip(0).clone()
        model.out_head.weight = torch.nn.Parameter(flipped)
    _same(ours, book, ids, 5)
    assert len(captures) == 2


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantised_weights(captures, precision, tied):
    given, _ = pair(emb_dim=96, n_layers=1)
    if tied:
        given.out_head.weight = given.tok_emb.weight
    model, ids = fastgpt.quantize(given.eval(), precision), some_ids(B=2, T=3)
    mine = fastgpt.generate_text_simple(model, ids, 5, CONFIG["context_length"])
    assert len(captures) == 1
    with fastgpt.use_backend("reference"):
        again = fastgpt.generate_text_simple(model, ids, 5, CONFIG["context_length"])
    assert torch.equal(mine, again)
    assert len(captures) == 1


def test_few_steps_and_other_models_go_without(captures):
    ours, book = pair(n_layers=1)
    ids = some_ids(B=1, T=3)
    _same(ours, book, ids, decode_graph.MIN_STEPS)
    for model in (ours, book):
        model.trf_blocks[0].ff = torch.nn.Linear(CONFIG["emb_dim"], CONFIG["emb_dim"])
    book.load_state_dict(ours.state_dict())
    _same(ours, book, ids, 5)
    assert captures == []


def _stream_and_book(ours, book, ids, new, change, after=2):
    """The stream's tokens and the book's, with change(model) made behind so many of them."""
    mine, theirs = ids, ids
    stream = fastgpt.generate_stream(ours, ids, new, CONFIG["context_length"])
    for i in range(new):
        if i == after:
            change(ours), change(book)
        mine = torch.cat((mine, next(stream)), 1)
        theirs = reference.generate_text_simple(book, theirs, 1, CONFIG["context_length"])
    assert next(stream, None) is None
    return mine, theirs


def test_a_stream_goes_by_the_graph_of_generate(captures):
    ours, book = pair(n_layers=1)
    mine, theirs = _stream_and_book(ours, book, some_ids(B=2, T=3), 5, lambda model: None)
    assert torch.equal(mine, theirs)
    _same(ours, book, some_ids(B=2, T=4), 5)
    assert len(captures) == 1


CHOICES = {
    "greedy": {},
    "temperature": {"temperature": 1.5},
    "top_k": {"temperature": 1.5, "top_k": 9},
    "top_p": {"temperature": 1.5, "top_k": 50, "top_p": 0.8},
    "eos": {"temperature": 1.5, "eos_id": 7},
}


def _drawn(model, ids, new=5, generate=fastgpt.generate, **choice):
    """The tokens under one seed, and where the generator is then."""
    torch.manual_seed(7)
    tokens = generate(model, ids, new, CONFIG["context_length"], **choice)
    return tokens, torch.get_rng_state()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_streams_reader_may_change_the_tokens(captures, mode):
    ours, _ = pair(n_layers=1)
    found = []
    for backend in (contextlib.nullcontext(), fastgpt.use_backend("reference")):
        with mode(), backend:
            seen = []
            args = (some_ids(B=2, T=3), 6, CONFIG["context_length"])
            for new in fastgpt.generate_stream(ours, *args):
                seen.append(new.clone())
                new.add_(7).remainder_(CONFIG["vocab_size"])
        found.append(torch.cat(seen, 1))
    assert len(captures) == 1
    assert torch.equal(*found)


def _streamed(model, ids, *args, **choice):
    return torch.cat((ids, *fastgpt.generate_stream(model, ids, *args, **choice)), 1)


@pytest.mark.parametrize(("B", "generate"), [(1, _streamed), (3, fastgpt.generate)])
def test_the_graph_chooses_as_the_operations_do(captures, choices, B, generate):
    ours, _ = pair(n_layers=1)
    ids = some_ids(B=B, T=3)
    for choice in CHOICES.values():
        with fastgpt.use_backend("reference"):
            expected = _drawn(ours, ids, **choice)
        found = _drawn(ours, ids, generate=generate, **choice)
        assert all(map(torch.equal, found, expected)), choice
    assert len(captures) == 1  # another choice leaves the step as it was captured
    assert len(choices) == len(CHOICES)


def test_a_choice_is_kept(captures, choices):
    ours, _ = pair(n_layers=1)
    for length in (3, 4):
        _drawn(ours, some_ids(B=1, T=length), temperature=1.5)
    assert len(choices) == 1


def test_few_steps_capture_no_other_choice(captures, choices):
    ours, _ = pair(n_layers=1)
    ids = some_ids(B=1, T=3)
    _drawn(ours, ids)
    kept = idle[ours]
    _drawn(ours, ids, new=2, temperature=1.5)
    assert idle[ours] is kept
    assert len(choices) == 1


def test_a_choice_that_cannot_be_captured_leaves_the_ordinary_steps(captures, monkeypatch):
    ours, _ = pair(n_layers=1)
    ids = some_ids(B=1, T=3)
    expected = _drawn(ours, ids, temperature=1.5)
    ours.reset_kv_cache()
    capture = decode_graph.capture

    def fails(run):
        if (found := capture(run))[1].is_floating_point():
            return found
        raise RuntimeError("no such draw")

    monkeypatch.setattr(decode_graph, "capture", fails)
    with pytest.warns(fastgpt.BackendWarning, match="without a CUDA graph.*no such draw"):
        found = _drawn(ours, ids, temperature=1.5)
    assert all(map(torch.equal, found, expected))
    assert ours not in idle


def _replace(model):
    model.out_head.weight = torch.nn.Parameter(model.out_head.weight.detach().flip(0).clone())


def _move(model):
    model.out_head.weight.data = model.out_head.weight.data.flip(0).clone()


def _write(model):
    model.out_head.weight.data.copy_(model.out_head.weight.data.flip(0))


def _hook(model):
    model.final_norm.register_forward_hook(lambda module, args, out: -out)


def _swap(model):
    torch.manual_seed(9)
    model.out_head = torch.nn.Linear(CONFIG["emb_dim"], CONFIG["vocab_size"], bias=False)


@pytest.mark.parametrize("change", [_replace, _move, _write, _hook, _swap])
def test_a_change_between_two_tokens_is_seen(captures, change):
    ours, book = pair(n_layers=1)
    ids = some_ids(B=1, T=3)
    unchanged = reference.generate_text_simple(book, ids, 5, CONFIG["context_length"])
    mine, theirs = _stream_and_book(ours, book, ids, 5, change)
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, unchanged)
    assert len(captures) == 1


@pytest.mark.parametrize("way", ["mode", "autocast", "backend"])
def test_a_stream_leaves_a_graph_that_cannot_serve(captures, monkeypatch, way):
    ours, _ = pair(n_layers=1, drop_rate=0.5)
    ours.eval()
    step, steps = decode_graph.Decoder.next, []
    monkeypatch.setattr(decode_graph.Decoder, "next", lambda *args: steps.append(1) or step(*args))
    stream = fastgpt.generate_stream(ours, some_ids(B=1, T=3), 5, CONFIG["context_length"])
    for _ in range(3):
        next(stream)
    if way == "mode":
        ours.drop_emb.train()
        next(stream)
    elif way == "autocast":
        # The cached keys are float32, which is an error without a graph too.
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="cache holds"):
            next(stream)
    else:
        with fastgpt.use_backend("reference"):
            next(stream)
    assert len(steps) == 2


@pytest.mark.parametrize("leave", ["close", "drop", "error"])
def test_a_stream_left_half_way_gives_its_graph_back(captures, leave):
    ours, book = pair(n_layers=1)
    stream = fastgpt.generate_stream(ours, some_ids(B=1, T=3), 6, CONFIG["context_length"])
    for _ in range(3):
        next(stream)
    assert ours not in idle
    if leave == "close":
        stream.close()
    elif leave == "drop":
        del stream
    else:
        ours.trf_blocks[0].ff.register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(stream)
        ours.trf_blocks[0].ff._forward_hooks.clear()
    assert ours in idle
    _same(ours, book, some_ids(B=1, T=5), 5)
    assert len(captures) == 1


def test_streams_in_turn_have_a_graph_each(captures):
    ours, book = pair(n_layers=1)
    starts = [some_ids(B=1, T=3), some_ids(B=1, T=5, seed=3)]
    streams = [fastgpt.generate_stream(ours, ids, 5, CONFIG["context_length"]) for ids in starts]
    new = [torch.cat(tokens, 1) for tokens in zip(*zip(*streams, strict=True), strict=True)]
    for ids, tokens in zip(starts, new, strict=True):
        theirs = reference.generate_text_simple(book, ids, 5, CONFIG["context_length"])
        assert torch.equal(torch.cat((ids, tokens), 1), theirs)
    assert len(captures) == 2


def test_a_model_keeps_one_graph_until_its_cache_is_reset(captures, choices):
    ours, book = pair(n_layers=1)
    decoders = weakref.WeakSet()
    for batch in (1, 2, 1):
        _same(ours, book, some_ids(B=batch, T=3), 5)
        decoders.add(idle[ours])
        captures.clear(), choices.clear()  # each holds its decoder, and is held by it
    gc.collect()
    assert len(decoders) == 1
    _same(ours, book, some_ids(B=2, T=3), 2)  # too few steps to make another
    assert idle[ours] in decoders
    ours.reset_kv_cache()
    assert ours not in idle
    _same(ours, book, some_ids(B=1, T=3), 5)
    assert len(captures) == 1


def test_training_gets_the_memory_of_the_graph(captures):
    ours, book = pair(n_layers=1)
    _same(ours, book, some_ids(B=1, T=3), 5)
    assert ours.eval() is ours
    assert ours in idle
    assert ours.train() is ours
    assert ours not in idle


def test_a_failed_capture_leaves_the_ordinary_steps(captures, monkeypatch):
    ours, book = pair(n_layers=1)
    capture = decode_graph.capture

    def fails(run):
        run()
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(decode_graph, "capture", fails)
    with pytest.warns(fastgpt.BackendWarning, match="without a CUDA graph.*no memory"):
        _same(ours, book, some_ids(B=1, T=3), 5)
    assert ours not in idle
    monkeypatch.setattr(decode_graph, "capture", capture)
    _same(ours, book, some_ids(B=1, T=3), 5)
    assert len(captures) == 1


def test_inference_mode_and_none_share_a_graph(captures):
    ours, book = pair(n_layers=1)
    with torch.inference_mode():
        _same(ours, book, some_ids(B=1, T=3), 5)
    _same(ours, book, some_ids(B=1, T=4), 5)
    with torch.inference_mode():
        _same(ours, book, some_ids(B=1, T=3), 5)
    assert len(captures) == 1


def test_ids_that_the_embedding_lacks_are_refused(captures):
    ours, _ = pair(n_layers=1)
    ours.out_head = torch.nn.Linear(CONFIG["emb_dim"], CONFIG["vocab_size"] + 1)
    with torch.no_grad():
        ours.out_head.bias[-1] = 1e4
    with pytest.raises(IndexError, match="token id 61 is outside the vocabulary of 61"):
        fastgpt.generate_text_simple(ours, some_ids(B=1, T=3), 12, 32)


def test_graphs_go_with_their_model(captures):
    ours, book = pair(n_layers=1)
    _same(ours, book, some_ids(B=1, T=3), 5)
    again = copy.deepcopy(ours)
    before = len(idle)
    del ours
    captures.clear()
    gc.collect()
    assert len(idle) == before - 1
    _same(again, book, some_ids(B=1, T=3), 5)
    assert len(captures) == 1


def test_without_the_kernels_of_a_fused_step_the_graph_is_of_single_operations(
    captures, monkeypatch
):
    ours, book = pair(n_layers=1)
    begun = []
    launchers = dispatch.module("triton", "decode_step", ours.pos_emb.weight)
    begin = launchers.begin_step
    monkeypatch.setitem(vars(launchers), "begin_step", lambda *a: begun.append(1) or begin(*a))
    _same(ours, book, some_ids(B=2, T=3), 4)
    assert len(begun) == 4
    ours.reset_kv_cache()
    monkeypatch.setattr(dispatch, "_failed", {("decode_step", None): "does not compile"})
    _same(ours, book, some_ids(B=2, T=3), 4)
    assert len(begun) == 4
    assert len(captures) == 2
