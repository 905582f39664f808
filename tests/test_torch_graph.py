"""Generation by captured steps of PyTorch's own operations, as on a GPU that Triton does not serve,
with capturing replaced by running the step again.
"""

import pytest
import torch
from helpers import assert_as_exact
from test_generation import CONFIG, _models

import fastgpt
from fastgpt import dispatch
from fastgpt.model import decode_graph
from fastgpt.model.cache import idle
from fastgpt.model.token_pass import parts_of
from fastgpt.quantized_weight import PRECISIONS

CONTEXT = CONFIG["context_length"]
CHOICES = {
    "greedy": {},
    "temperature": {"temperature": 1.5},
    "top_k": {"temperature": 1.5, "top_k": 9},
    "top_p": {"temperature": 1.5, "top_p": 0.8},
}
pytestmark = [
    pytest.mark.usefixtures("captures"),
    pytest.mark.filterwarnings("ignore:fastgpt's triton backend is passed over.*too old"),
]


@pytest.fixture
def captures(monkeypatch):
    """The runs that were captured. CPU tensors pass for those of a GPU that is too old."""
    row = dispatch._KERNELS["triton"]._replace(device="cpu", reason=lambda index: "it is too old")
    monkeypatch.setitem(dispatch._KERNELS, "triton", row)
    monkeypatch.setitem(dispatch._BY_DEVICE, "cpu", "triton")
    found = []

    def capture(run):
        with torch.random.fork_rng([]):
            result = run().clone()
        found.append(run)
        return lambda: result.copy_(run()), result

    monkeypatch.setattr(decode_graph, "capture", capture)
    return found


def _ids(B=1, T=3):
    return torch.randint(0, CONFIG["vocab_size"], (B, T))


def _drawn(model, ids, new=12, generate=fastgpt.generate, **choice):
    """The tokens under one seed, and where the generator is then."""
    torch.manual_seed(7)
    tokens = generate(model, ids, new, CONTEXT, **choice)
    return tokens, torch.get_rng_state()


def _plain(*args, **choice):
    with fastgpt.use_backend("reference"):
        return _drawn(*args, **choice)


def _same(model, ids, new=12, **choice):
    found = _drawn(model, ids, new, **choice)
    assert all(map(torch.equal, found, _plain(model, ids, new, **choice))), choice


@pytest.mark.parametrize("B", [1, 3])
def test_the_tokens_and_draws_of_the_plain_steps(captures, B):
    model, _ = _models()
    ids = _ids(B)
    for choice in CHOICES.values():
        _same(model, ids, **choice)
    assert len(captures) == 1 + len(CHOICES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_logits_are_as_exact_as_the_whole_pass(dtype):
    model, book = _models()
    model, book = model.to(dtype), book.to(dtype)
    _, exact = _models()
    exact.load_state_dict(book.state_dict())  # the same numbers as in dtype
    ids = _ids(2, CONTEXT)
    cache = fastgpt.KVCache(CONFIG["n_layers"])
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
        with decode_graph.decoding(model, cache, CONTEXT - 5) as decoder:
            found = [decoder.step(ids[:, [i]]).clone() for i in range(5, CONTEXT)]
        whole = (m(ids)[:, 5:] for m in (book, exact.double()))
    assert_as_exact(torch.cat(found, 1), *whole)


def test_rows_without_a_sequence_and_rows_at_the_end_stay():
    parts = parts_of(_models()[0])
    state = decode_graph.State(parts, 3)
    state.position.copy_(torch.tensor([CONTEXT, 0, CONTEXT - 1]))
    before = [cache[0, :, :CONTEXT].clone() for pair in state.caches for cache in pair]
    with torch.no_grad():
        for _ in range(2):
            decode_graph.step(parts, state)
    assert state.position.tolist() == [CONTEXT, 0, CONTEXT]
    after = [cache[0, :, :CONTEXT] for pair in state.caches for cache in pair]
    assert all(map(torch.equal, before, after))
    assert state.caches[0][0][2, :, CONTEXT - 1].any()


def test_a_stream_waits_for_the_one_that_used_the_memory(monkeypatch):
    class Stream:
        def __init__(self):
            self.waited_for = []

        def wait_stream(self, other):
            self.waited_for.append(other)

    now, recorded = Stream(), []
    monkeypatch.setattr(decode_graph, "current_stream", lambda device: now)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: recorded.append((t, s)))
    model, _ = _models()
    first, second = now, Stream()
    for _ in range(2):
        _same(model, _ids())
    assert (recorded, first.waited_for) == ([], [])
    now = second
    for _ in range(2):
        _same(model, _ids())
    assert second.waited_for == [first]
    own = [*idle[model].state.tensors()]
    assert len(own) == 3 + 2 * CONFIG["n_layers"]
    assert all(t is mine and s is second for (t, s), mine in zip(recorded, own, strict=True))


@pytest.mark.parametrize("at", [0, 3], ids=["the prompt's", "a step's"])
@pytest.mark.parametrize("inference", [False, True])
def test_an_id_that_a_reader_writes_is_looked_at(inference, at):
    model, _ = _models()
    with torch.inference_mode(inference):
        stream = fastgpt.generate_stream(model, _ids(), 12, CONTEXT)
        for _ in range(at):
            next(stream)
        next(stream).fill_(CONFIG["vocab_size"])
        with pytest.raises(IndexError, match="token id 61 is outside the vocabulary of 61"):
            next(stream)


def test_inference_mode_copies_no_ids(monkeypatch):
    looked = []
    monkeypatch.setattr(decode_graph, "check_ids", lambda *args: looked.append(1))
    model, _ = _models()
    with torch.inference_mode():
        _same(model, _ids())
    assert len(looked) == 1  # the prompt's token, of which it is not known who wrote to it


def test_room_for_a_text_and_no_more_than_as_many_again(captures):
    model, _ = _models(n_layers=1)
    for T, new, capacity, captured in [(3, 10, 16, 2), (2, 9, 16, 2), (3, 16, CONTEXT, 4)]:
        _same(model, _ids(T=T), new)
        assert idle[model].state.capacity == capacity
        assert len(captures) == captured
    _same(model, _ids(), 10)
    assert len(captures) == 4  # in the larger one


def test_up_to_the_context_and_past_it(captures):
    model, _ = _models(n_layers=1)
    _same(model, _ids(), CONTEXT + 5)
    assert len(captures) == 2


def test_what_an_earlier_text_left_does_not_matter():
    model, _ = _models(n_layers=1)
    _same(model, _ids(), 12)
    for cache in idle[model].state.caches[0]:
        cache.fill_(torch.nan)
    _same(model, _ids(), 10)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantised_weights(captures, precision):
    given, _ = _models(emb_dim=96)
    given.out_head.weight = given.tok_emb.weight
    _same(fastgpt.quantize(given, precision), _ids(2))
    assert len(captures) == 2


def _hook(model):
    model.final_norm.register_forward_hook(lambda module, args, out: -out)


def _move(model):
    model.out_head.weight.data = model.out_head.weight.data.flip(0).clone()


@pytest.mark.parametrize("change", [_hook, _move])
def test_a_change_between_two_tokens_is_seen(captures, change):
    def streamed(model, ids, *args):
        tokens = [ids]
        for i, new in enumerate(fastgpt.generate_stream(model, ids, *args)):
            tokens.append(new)
            if i == 3:
                change(model)
        return torch.cat(tokens, 1)

    (model, _), ids = _models(), _ids(2)
    again, _ = _models()
    again.load_state_dict(model.state_dict())
    found = _drawn(model, ids, generate=streamed)
    assert torch.equal(found[0], _plain(again, ids, generate=streamed)[0])
    assert len(captures) == 2


def test_a_stream_leaves_the_graph_where_the_backend_is_asked_for(monkeypatch):
    model, _ = _models(n_layers=1)
    following, steps = decode_graph.Decoder.next, []
    monkeypatch.setattr(
        decode_graph.Decoder, "next", lambda *args: steps.append(1) or following(*args)
    )
    stream = fastgpt.generate_stream(model, _ids(), 12, CONTEXT)
    for _ in range(3):
        next(stream)
    with fastgpt.use_backend("reference"):
        next(stream)
    assert len(steps) == 2


def test_a_failed_capture_leaves_the_ordinary_steps(monkeypatch):
    model, _ = _models(n_layers=1)

    def fails(run):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(decode_graph, "capture", fails)
    with pytest.warns(fastgpt.BackendWarning, match="without a CUDA graph.*no memory"):
        _same(model, _ids())
    assert model not in idle


def test_no_graph_by_name_or_where_the_kernels_run(captures, monkeypatch):
    model, _ = _models(n_layers=1)
    pos = model.pos_emb.weight
    assert decode_graph.can_run(pos)
    with fastgpt.use_backend("reference"):
        assert not decode_graph.can_run(pos)
    _plain(model, _ids())
    with fastgpt.batch_invariant():
        assert not decode_graph.can_run(pos)
    monkeypatch.setitem(dispatch._BY_DEVICE, "cpu", "cpu")
    assert not decode_graph.can_run(pos)
    _drawn(model, _ids())
    assert captures == []


@pytest.mark.parametrize("choice", CHOICES)
def test_generate_batch_goes_prompt_by_prompt(captures, choice):
    model, _ = _models(n_layers=1)
    prompts, choice = [_ids(T=n)[0].tolist() for n in (3, 5)], CHOICES[choice]
    found = fastgpt.generate_batch(model, prompts, 12, seed=5, **choice)
    with fastgpt.use_backend("reference"):
        assert found == fastgpt.generate_batch(model, prompts, 12, seed=5, **choice)
    assert len(captures) == 1 + (choice == {})  # own generators draw outside the graph
