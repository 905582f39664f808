"""Models in 8 and 4 bits: what they consist of, what they compute, and what readers do to them."""

import copy
import pickle

import pytest
import torch
from helpers import PATHS, use_path
from pairs import pair, shake, some_ids
from quantized_models import KINDS, WIDE, full, hook, logits, logits_of, quantized
from torch import nn

import fastgpt
from fastgpt.model.quantization import QuantizedEmbedding, QuantizedLinear
from fastgpt.quantized_weight import Int8Weight, dequantize

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 9), (3, 40), (5, 120)])
@pytest.mark.parametrize(("precision", "group"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_whole_pass(path, shape, precision, group, dtype):
    """Of few rows and of many, on every instruction set: PyTorch's bfloat16 products, over the
    weights that are stored, are the measure of the error.
    """
    changes = {"context_length": 128, "emb_dim": 192 if group == 64 else 96}
    given = pair(WIDE | changes)[0].eval().to(dtype)
    given.out_head.weight = given.tok_emb.weight
    model, wide = fastgpt.quantize(given, precision, group), copy.deepcopy(given)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
            weight = wide.get_submodule(name).weight
            weight.data = dequantize(layer.quantized_weight, dtype)
    idx = torch.randint(0, 61, shape)
    with use_path(path):
        got, cache = model(idx), fastgpt.KVCache(2)
        parts = [
            model(part, cache=cache) for part in idx.split([1, shape[1] - 1], 1) if part.numel()
        ]
    with fastgpt.use_backend("reference"):
        exact = copy.deepcopy(wide).double()(idx)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = wide(idx)
    allowed = 2 * (theirs.double() - exact).abs().max()
    if precision == "int8-dynamic":
        allowed *= 4  # a row's values in 255 steps of its largest, where bfloat16 has 256 an octave
    assert got.dtype is dtype
    for y in (got, torch.cat(parts, 1)):
        assert (y.double() - exact).abs().max() <= allowed


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("precision", "group"), KINDS)
class TestModel:
    def test_is_the_model_with_the_weights_that_are_stored(self, precision, group, tied):
        model = quantized(precision, tied, group)
        wide = full(tied, wide=group == 64)
        for path, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                weight = wide.get_submodule(path).weight
                weight.data = dequantize(layer.quantized_weight, torch.float32)
                assert layer.group == (group if precision == "int4" else None)
                assert repr(layer).endswith(f"precision={precision})")
        ids = some_ids()
        with torch.no_grad():
            torch.testing.assert_close(model.tok_emb(ids), wide.tok_emb(ids), rtol=1e-6, atol=1e-7)
        got, right = logits(model), logits(wide)
        if precision == "int8-dynamic":
            assert 0 < (got - right).abs().max() < 0.1 * right.abs().max()
        else:
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)

    def test_what_it_consists_of(self, precision, group, tied):
        given = full(tied, wide=group == 64)
        before = {name: t.clone() for name, t in given.state_dict().items()}
        model = fastgpt.quantize(given.train(), precision, group)
        assert given.training
        assert not model.training
        assert type(model.out_head) is QuantizedLinear
        assert type(model.tok_emb) is (QuantizedEmbedding if tied else nn.Embedding)
        assert type(given.out_head) is nn.Linear
        after = given.state_dict()
        assert all(torch.equal(after[name], t) for name, t in before.items())
        assert all(p.requires_grad for p in given.parameters())
        assert not any(p.requires_grad for p in model.parameters())
        theirs = {p.untyped_storage().data_ptr() for p in given.parameters()}
        tensors = [*model.parameters(), *model.buffers()]
        assert not any(t.untyped_storage().data_ptr() in theirs for t in tensors)
        names = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
        right = (
            {"weight_int4", "scale", "minimum"}
            if precision == "int4"
            else {
                "weight_int8",
                "scale",
            }
        )
        assert names == right

    def test_generates_through_a_cache(self, precision, group, tied):
        model, ids = quantized(precision, tied, group), some_ids(T=5)
        out = fastgpt.generate_text_simple(model, ids, 12, 32)
        for t in range(5, 17):
            assert torch.equal(logits_of(model, out[:, :t]).argmax(-1), out[:, t])
        cache = fastgpt.KVCache(2)
        with torch.no_grad():
            parts = [model(part, cache=cache) for part in out.split(6, dim=1)]
        torch.testing.assert_close(
            torch.cat(parts, 1)[:, -1], logits_of(model, out), rtol=1e-3, atol=1e-3
        )

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "assign", "meta"])
    def test_copies_compute_the_same(self, precision, group, tied, way):
        model = quantized(precision, tied, group)
        if way == "deepcopy":
            other = copy.deepcopy(model)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            other = shake(full(tied, wide=group == 64))
            if way == "meta":
                with torch.device("meta"):
                    other = fastgpt.GPTModel(other.cfg)
                if tied:
                    other.out_head.weight = other.tok_emb.weight
                other = fastgpt.quantize(other, precision, group)
                assert all(t.is_meta for t in (*other.parameters(), *other.buffers()))
            else:
                other = fastgpt.quantize(other, precision, group)
                assert not torch.equal(logits(other), logits(model))
            assign = way != "state_dict"
            other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
        assert torch.equal(logits(other), logits(model))
        if tied:
            held = [m.quantized_weight.values for m in (other.tok_emb, other.out_head)]
            assert held[0].data_ptr() == held[1].data_ptr()

    def test_moves(self, precision, group, tied):
        model = quantized(precision, tied, group)
        before = {name: b.clone() for name, b in model.named_buffers()}
        model.to(torch.float64).half().bfloat16().type(torch.float32).to("cpu")
        model.to(torch.bfloat16)
        after = dict(model.named_buffers())
        assert after.keys() == before.keys()
        for name, b in before.items():
            assert after[name].dtype == b.dtype
            assert torch.equal(after[name], b)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert logits(model).dtype == model.tok_emb(some_ids()).dtype == torch.bfloat16
        if tied:
            assert model.tok_emb.scale is model.out_head.scale
        assert logits(model.to("meta").to_empty(device="cpu")).shape == (2, 9, 61)

    def test_compiles_whole(self, precision, group, tied):
        model = quantized(precision, tied, group)
        torch.compiler.reset()  # other tests' compilations count against the same limit
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got, right = logits(compiled), logits(model)
        # Sums in another order take a value of x that lies halfway to the other of two steps.
        step = 2 / 127 if precision == "int8-dynamic" else 0
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4 + step * right.abs().max())


def test_from_bfloat16():
    model = fastgpt.quantize(full(tied=True).bfloat16(), "int8")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.out_head.scale.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16


def test_layers_of_one_weight_share_what_is_stored():
    given = full()
    first, second = given.trf_blocks[0].ff.layers, given.trf_blocks[1].ff.layers
    second[0].weight, second[2] = first[0].weight, first[2]
    model = fastgpt.quantize(given, "int8")
    first, second = model.trf_blocks[0].ff.layers, model.trf_blocks[1].ff.layers
    assert second[0] is not first[0]
    assert second[0].weight_int8 is first[0].weight_int8
    assert second[2] is first[2]


def test_over_another_librarys_modules():
    from fastgpt import reference

    book = reference.GPTModel(WIDE).eval()
    model = fastgpt.quantize(fastgpt.accelerate(book), "int8")
    assert type(book.out_head) is nn.Linear
    with torch.no_grad():
        assert (model(some_ids()) - book(some_ids())).abs().max() < 0.05


def test_an_id_outside_the_vocabulary():
    for tied in (True, False):
        for wrong in (61, -1):
            with pytest.raises(IndexError, match=f"token id {wrong} is outside the vocabulary"):
                quantized(tied=tied)(torch.tensor([[3, wrong]]))


def test_its_own_cache_starts_empty():
    given = full()
    given(some_ids(), use_cache=True)
    model = fastgpt.quantize(given, "int8")
    with torch.no_grad():
        torch.testing.assert_close(model(some_ids(), use_cache=True), logits(model))


def test_explained(capsys):
    fastgpt.explain(quantized(tied=True))
    assert "the whole pass is one call into C++" in capsys.readouterr().out
    model = quantized(tied=True)
    hook(model)
    fastgpt.explain(model)
    assert "att.W_key: a forward hook" in capsys.readouterr().out


def test_the_embedding_outlives_the_head():
    model = quantized(tied=True)
    table = model.tok_emb(some_ids())
    model.out_head = nn.Linear(96, 2)
    model.to(torch.float64)
    assert model(some_ids()).shape == (2, 9, 2)
    torch.testing.assert_close(model.tok_emb(some_ids()).float(), table)
    assert isinstance(model.tok_emb.quantized_weight, Int8Weight)
