"""Inside batch_invariant a token's logits are the same bits whatever pass they come from."""

import threading

import pytest
import torch
from same_bits import KINDS, LAYERS, VOCABULARY, ids_of, model_of
from torch import nn

import fastgpt
from fastgpt import cpu, ops
from fastgpt.cpu.forward import PackedSequence
from fastgpt.model.cache import KVCache
from fastgpt.model.rows import packed_pass
from fastgpt.quantized_weight import quantize_int4, quantize_int8

pytestmark = pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing))
KINDS = [*KINDS, "int4"]
CONTEXT = 90


@pytest.fixture
def alike():
    with torch.no_grad(), fastgpt.batch_invariant():
        yield


def _model(kind="float32", **config):
    return model_of(kind, **({"context_length": CONTEXT, "emb_dim": 256} | config))


def _in_pieces(model, ids, *sizes):
    """Logits of the tokens as they come in pieces of these sizes, behind what is cached."""
    cache = KVCache(LAYERS)
    return torch.cat([model(part, cache=cache) for part in ids.split(sizes, dim=1)], dim=1)


def _check_every_way(model, ids):
    whole = model(ids)
    T = ids.shape[1]
    assert torch.equal(_in_pieces(model, ids, *[1] * T), whole)
    assert torch.equal(_in_pieces(model, ids, T), whole)
    assert torch.equal(_in_pieces(model, ids, 9, 2, 40, 1, T - 52), whole)
    for n in (1, 2, 3, 17, 34):
        assert torch.equal(model(ids[:, :n]), whole[:, :n])
    beside = torch.cat((ids_of(2, T), ids, ids_of(1, T)))
    assert torch.equal(model(beside)[2:3], whole)
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_gives_the_same_logits(fused, kind, alike):
    model, ids = _model(kind), ids_of(1, CONTEXT)
    whole = _check_every_way(model, ids)
    packed = [ids_of(n) for n in (1, 2, 40)]
    lengths = [PackedSequence(len(p)) for p in (*packed, ids[0])]
    together = packed_pass(model).run_packed(torch.cat((*packed, ids[0])), lengths)
    assert torch.equal(together[43:], whole[0])


def test_autocast(fused, alike):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _check_every_way(_model(), ids_of(1, CONTEXT))


def test_a_model_with_a_hook(fused, alike):
    model = _model()
    model.trf_blocks[0].register_forward_hook(lambda module, args, out: out * 1.5)
    model.trf_blocks[1].att.register_forward_hook(lambda module, args, out: out + 1.0)
    _check_every_way(model, ids_of(1, CONTEXT))


@pytest.mark.parametrize("kind", KINDS)
def test_threads(fused, kind, alike):
    model, ids = _model(kind, emb_dim=512), ids_of(3, CONTEXT)
    before = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(model(ids))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", KINDS)
def test_scores(fused, kind, alike):
    """A text's scores are those that it has alone; a part's, those in the whole."""
    model = _model(kind)
    texts = [ids_of(n) for n in (2, 3, 40, 80, 17)]
    together = fastgpt.score(model, texts)
    for text, scores in zip(texts, together, strict=True):
        assert torch.equal(fastgpt.score(model, [text])[0], scores)
        assert torch.equal(fastgpt.score(model, [text[:2]])[0], scores[:1])


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int4"])
def test_generated_logits_are_those_of_the_full_pass(fused, kind, alike):
    model = _model(kind)
    prompts = [ids_of(n).tolist() for n in (1, 30, 41)]
    for prompt, tokens in zip(prompts, fastgpt.generate_batch(model, prompts, 20), strict=True):
        expected = model(torch.tensor([tokens]))[0, len(prompt) - 1 : -1].argmax(-1)
        assert tokens[len(prompt) :] == expected.tolist()


def test_outside_and_in_other_threads_nothing_changes(fused):
    model, ids = _model(), ids_of(1, CONTEXT)
    elsewhere, entered = [], threading.Event()

    def run():
        entered.wait()
        with torch.no_grad():
            elsewhere.append(model(ids))

    thread = threading.Thread(target=run)
    thread.start()
    with torch.no_grad():
        before = model(ids)
        with fastgpt.batch_invariant():
            inside = model(ids)
            entered.set()
            thread.join()
        after = model(ids)
    assert torch.equal(after, before)
    assert torch.equal(elsewhere[0], before)
    torch.testing.assert_close(inside, before)
    assert not torch.equal(inside, before)  # sums run in another order, or this tests nothing


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6")
def test_what_was_compiled_runs_as_it_was():
    model, ids = _model(), ids_of(2, 10)
    compiled = []
    quick = torch.compile(model, backend=lambda graph, inputs: compiled.append(graph) or graph)
    first, second = fastgpt.batch_invariant(), fastgpt.batch_invariant()
    with torch.no_grad():
        first.__enter__()
        with second:
            assert torch.equal(quick(ids), model(ids))
        assert torch.equal(quick(ids), model(ids))
        first.__exit__(None, None, None)
        assert not compiled
        quick(ids)
    assert compiled


def _hooked(model):
    model.trf_blocks[0].register_forward_hook(lambda module, args, out: None)
    return model


@pytest.mark.parametrize(
    ("model", "context", "reason"),
    [
        (_model, torch.enable_grad, "gradients are recorded"),
        (lambda: _hooked(_model("bfloat16")), torch.no_grad, "it takes float32"),
        (lambda: _model().double(), torch.no_grad, "float64"),
        (_model, lambda: fastgpt.use_backend("reference"), "the size of the batch"),
        (lambda: _hooked(_model("int8").bfloat16()), torch.no_grad, "it takes float32"),
    ],
)
@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
def test_what_cannot_be_so_is_refused(model, context, reason):
    model = model()
    refused = pytest.raises(fastgpt.BackendError, match=f"batch_invariant: .*{reason}")
    with torch.no_grad(), fastgpt.batch_invariant(), context(), refused:
        model(ids_of(1, 5))
    with torch.no_grad():
        model(ids_of(1, 5))


def test_a_block_with_gradients_is_refused():
    block, x = _model().trf_blocks[0], torch.randn(1, 5, 256)
    refused = pytest.raises(fastgpt.BackendError, match="gradients are recorded")
    with fastgpt.batch_invariant(), refused:
        block(x)
    block(x).sum().backward()


def test_autocast_of_a_modified_model_is_refused():
    model = _hooked(_model())
    refused = pytest.raises(fastgpt.BackendError, match="under autocast")
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with torch.no_grad(), autocast, fastgpt.batch_invariant(), refused:
        model(ids_of(1, 5))


@pytest.mark.parametrize("kind", ["float32", "int8", "int8-dynamic", "int4", "loss"])
def test_a_weight_too_deep_for_the_scratch_is_refused(fused, kind, alike):
    """The deepest that is not has the same bits in every pass, as has one that is column-major."""
    deepest = cpu._C.deepest_alike()
    x, weight = torch.randn(40, deepest + 64), torch.randn(2, deepest + 64)

    def run(x, weight):
        if kind == "float32":
            return ops.linear(x, weight)
        if kind == "loss":
            targets = torch.zeros(len(x), dtype=torch.int64)
            return ops.linear_cross_entropy(x, weight, targets, reduction="none")
        narrow = quantize_int4(weight) if kind == "int4" else quantize_int8(weight)
        return ops.quantized_linear(x, narrow, dynamic=kind == "int8-dynamic")

    with pytest.raises(fastgpt.BackendError, match=r"batch_invariant: .* too deep"):
        run(x, weight)
    deep = x[:, :deepest].contiguous(), weight[:, :deepest].contiguous()
    assert torch.equal(run(*deep)[:1], run(deep[0][:1], deep[1]))
    if kind in ("float32", "loss"):
        columns = weight.t().contiguous().t()
        assert torch.equal(run(x, columns)[:1], run(x[:1], columns))


def test_a_foreign_module_runs_as_it_does(alike):
    model = _model()
    model.out_head = nn.Sequential(model.out_head)
    assert model(ids_of(1, 5)).shape == (1, 5, VOCABULARY)
