"""Models in 8 and 4 bits: what is stored, what it computes, and what readers do to the result."""

import copy
import pickle
import re

import pytest
import torch
from helpers import PATHS, use_path
from pairs import CONFIG, pair, shake, some_ids, weigh, wrap_weight
from torch import nn
from torch.nn import functional as F

import fastgpt
from fastgpt import ops
from fastgpt.model.quantization import QuantizedEmbedding, QuantizedLinear
from fastgpt.quantized_weight import (
    PRECISIONS,
    Int8Weight,
    dequantize,
    quantize_int4,
    quantize_int8,
    quantize_weight,
)

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
# Whether many rows, or in "int8" and "int4" a few, are multiplied by bfloat16 pairs.
PAIRS = "avx512_bf16"
WIDE = CONFIG | {"emb_dim": 96}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = [(precision, 32) for precision in PRECISIONS] + [("int4", 64)]


def full(tied=False, **changes):
    model, _ = pair(WIDE | {"emb_dim": 192} if changes.pop("wide", False) else WIDE, **changes)
    if tied:
        model.out_head.weight = model.tok_emb.weight
    return model.eval()


def quantized(precision="int8", tied=False, group=32):
    return fastgpt.quantize(full(tied, wide=group == 64), precision, group)


def logits(model):
    with torch.no_grad():
        return model(some_ids())


def unpacked(weight):
    """q of an Int4Weight, [n_out, n_in], element by element as the layout says."""
    n_out, n_bytes = weight.values.shape
    q = torch.empty(n_out, 2 * n_bytes, dtype=torch.int64)
    for i in range(2 * n_bytes):
        run, place = divmod(i, 32)
        byte = weight.values[:, 16 * run + place % 16].long()
        q[:, i] = byte >> 4 if place >= 16 else byte & 15
    return q


def wide_int4(weight):
    """An Int4Weight in float64, by the formula."""
    q = unpacked(weight)
    group = q.shape[1] // weight.scale.shape[1]
    scale, low = (t.double().repeat_interleave(group, 1) for t in weight[1:])
    return scale * q + low


class TestWeights:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_int8_is_half_a_step_away_at_most(self, dtype):
        w = (torch.randn(37, 96) * torch.logspace(-3, 3, 37)[:, None]).to(dtype)
        w[5] = 0
        stored = quantize_int8(w)
        assert (stored.values.dtype, stored.scale.dtype) == (torch.int8, torch.float32)
        assert stored.values.min() >= -127
        assert stored.values[5].count_nonzero() == stored.scale[5] == 0
        exact = stored.values.double() * stored.scale.double()[:, None]
        torch.testing.assert_close(stored.scale.double() * 127, w.double().abs().amax(1))
        step = stored.scale.double()[:, None]
        assert ((exact - w.double()).abs() <= step * 0.5 * (1 + 1e-4)).all()
        assert torch.equal(dequantize(stored, torch.float64), exact)
        torch.testing.assert_close(dequantize(stored, dtype), exact.to(dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("group", [32, 64])
    def test_int4_is_the_nearest_of_its_grid(self, dtype, group):
        w = (torch.randn(37, 192) * torch.logspace(-2, 2, 37)[:, None] + 0.01).to(dtype)
        stored = quantize_int4(w, group)
        assert [t.shape for t in stored] == [(37, 96), (37, 192 // group), (37, 192 // group)]
        kinds = [torch.uint8, torch.bfloat16, torch.bfloat16]
        assert [t.dtype for t in stored] == kinds
        exact = wide_int4(stored)
        grouped = w.double().unflatten(1, (-1, group))
        scale, low = (t.double()[..., None] for t in stored[1:])
        grid = scale[..., None] * torch.arange(16) + low[..., None]
        nearest = (grid - grouped[..., None]).abs().amin(-1).flatten(1)
        error = (exact - w.double()).abs()
        assert (error <= nearest + 1e-6 * w.double().abs()).all()
        # The grid from the least to the greatest errs by half a step, and by what bfloat16 takes
        # from its ends; the one that is taken has no larger sum of squares.
        reach = grouped.amax(-1) - grouped.amin(-1)
        ends = (grouped.amin(-1).abs() + reach) * 2.0**-8
        squares = error.square().unflatten(1, (-1, group)).sum(-1)
        assert (squares <= group * (reach / 30 + ends) ** 2).all()
        torch.testing.assert_close(dequantize(stored, torch.float64), exact)
        torch.testing.assert_close(dequantize(stored, dtype), exact.to(dtype))

    @pytest.mark.parametrize("group", [32, 64])
    def test_int4_fits_its_grid_to_the_weights(self, group):
        """Least squares from each group's ends alone get to 0.93 and 0.95 of the plain error."""
        w = torch.randn(256, 768)
        grouped = w.unflatten(1, (-1, group))
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        step = (high - low) / 15
        plain = (((grouped - low) / step).round() * step + low).flatten(1)
        for shift in (0.0, 0.25):  # what bfloat16 ends can follow
            stored = dequantize(quantize_int4(w + shift, group), torch.float32) - shift
            assert (stored - w).norm() < 0.92 * (plain - w).norm()

    @pytest.mark.parametrize("value", [0.0, 0.3, -2.7])
    def test_int4_of_one_value(self, value):
        stored = quantize_int4(torch.full((2, 64), value))
        assert (dequantize(stored, torch.float32) - value).abs().max() <= abs(value) * 2.0**-8

    def test_in_pieces_as_in_one(self):
        w = torch.randn(1500, 384)
        for precision in PRECISIONS:
            whole = quantize_weight(w, precision)
            parts = [quantize_weight(part, precision) for part in w.split(100)]
            for t, cut in zip(whole, zip(*parts, strict=True), strict=True):
                assert torch.equal(t, torch.cat(cut))

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_no_number(self, precision, value):
        w = torch.randn(4, 64)
        w[2, 40] = value
        with pytest.raises(ValueError, match="NaN, infinite or too large"):
            quantize_weight(w, precision)

    def test_what_has_no_such_form(self):
        for w, group, said in (
            (torch.randn(4, 48), 32, "its width 48 is not a multiple of the group of 32"),
            (torch.randn(4, 96), 64, "its width 96 is not a multiple of the group of 64"),
            (torch.randn(4, 96), 16, "a group of 16 is not possible, expected 32 or 64"),
            (torch.randn(96), 32, r"it is float32 \[96\], not a floating-point matrix"),
            (torch.ones(4, 96).int(), 32, r"it is int32 \[4, 96\], not"),
        ):
            with pytest.raises(ValueError, match=said):
                quantize_int4(w, group)
        with pytest.raises(ValueError, match="unknown precision 'int3', expected one of"):
            quantize_weight(torch.randn(4, 96), "int3")


class TestOperation:
    @pytest.mark.parametrize(
        ("path", "dtype"),
        [(path, torch.float32) for path in PATHS] + [("auto", dtype) for dtype in DTYPES],
    )
    @pytest.mark.parametrize(("precision", "group"), KINDS)
    def test_against_float64(self, path, precision, group, dtype):
        stored = quantize_weight(torch.randn(37, 192), precision, group)
        x, bias = torch.randn(2, 3, 192).to(dtype), torch.randn(37).to(dtype)
        x[0, 1] = 0
        dynamic = precision == "int8-dynamic"
        wide = x.double()
        if dynamic:
            scale = wide.abs().amax(-1, keepdim=True) / 127
            wide = (wide / scale.where(scale > 0, 1)).round() * scale
        exact = F.linear(wide, dequantize(stored, torch.float64), bias.double())
        with use_path(path):
            y = ops.quantized_linear(x, stored, bias, dynamic)
            pairs = fastgpt.cpu.isa() == PAIRS and path != "reference"
        assert y.dtype == dtype
        size = F.linear(wide.abs(), dequantize(stored, torch.float64).abs())
        # A value of x halfway between two of the grid may go to either.
        halfway = 127 * 1e-6 if dynamic else 0
        # Of each pair, two factors that are rounded by 2^-9 at most.
        factors = 2.0**-8 if pairs and not dynamic and dtype == torch.float32 else 0
        allowed = 4 * torch.finfo(dtype).eps + halfway + factors
        assert ((y.double() - exact).abs() <= size * allowed).all()

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own jvp
    @pytest.mark.parametrize(("precision", "group"), KINDS)
    def test_gradients(self, precision, group):
        stored = quantize_weight(torch.randn(5, 64), precision, group)
        dynamic = precision == "int8-dynamic"
        x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

        def product(x, bias=None):
            return ops.quantized_linear(x, stored, bias, dynamic)

        wide = dequantize(stored, torch.float64)
        got = torch.autograd.grad(weigh(product(x, bias)), (x, bias))
        right = torch.autograd.grad(weigh(F.linear(x, wide, bias)), (x, bias))
        torch.testing.assert_close(got, right)
        per_row = torch.func.vmap(torch.func.grad(lambda row: product(row).sum()))(x.detach())
        torch.testing.assert_close(per_row, wide.sum(0).expand(3, 64))
        _, tangent = torch.func.jvp(product, (x.detach(),), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, wide.sum(1).expand(3, 5))
        if not dynamic:
            assert torch.autograd.gradgradcheck(product, (x, bias))

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_autocast(self, precision):
        model, ids = quantized(precision), some_ids()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = model(ids)
        assert y.dtype == torch.bfloat16
        assert (y - logits(model)).abs().max() < 0.1 * y.abs().max()

    def test_nan_goes_through(self):
        x = torch.randn(2, 64)
        x[1, 3] = torch.nan
        for precision in PRECISIONS:
            stored = quantize_weight(torch.randn(5, 64), precision)
            y = ops.quantized_linear(x, stored, dynamic=precision == "int8-dynamic")
            assert y[0].isfinite().all()
            assert y[1].isnan().all()

    def test_what_does_not_fit(self):
        stored = quantize_int4(torch.randn(5, 64))
        with pytest.raises(TypeError, match="dynamic takes an Int8Weight, got Int4Weight"):
            ops.quantized_linear(torch.randn(2, 64), stored, dynamic=True)
        with pytest.raises(RuntimeError, match="shapes"):
            ops.quantized_linear(torch.randn(2, 32), stored)


@pytest.fixture
def float32_products():
    """On the fastest instruction set that doesn't round factors."""
    isas = [isa for isa in fastgpt.cpu.isas() if isa != PAIRS]
    with use_path(f"cpu-{isas[-1]}" if isas else "reference"):
        yield


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
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got, right = logits(compiled), logits(model)
        # Sums in another order take a value of x that lies halfway to the other of two steps.
        step = 2 / 127 if precision == "int8-dynamic" else 0
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4 + step * right.abs().max())


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids)[:, -1]


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


class Beside(nn.Module):
    """LoRA as in the book's appendix E."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.randn(linear.in_features, 4) * 0.02)
        self.B = nn.Parameter(torch.zeros(4, linear.out_features))

    def forward(self, x):
        return self.linear(x) + x @ self.A @ self.B


def put_lora(module):
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Beside(child))
        else:
            put_lora(child)


class TestTraining:
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_lora_learns(self, precision):
        model = quantized(precision, tied=True)
        put_lora(model)
        stored = {name: b.clone() for name, b in model.named_buffers()}
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n.rpartition(".")[2] for n in trained} == {"A", "B"}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model.train()
        ids, losses = some_ids(4, 12), []
        for _ in range(30):
            optimizer.zero_grad()
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert all(torch.equal(b, stored[name]) for name, b in model.named_buffers())

    @pytest.mark.usefixtures("float32_products")
    def test_gradients_reach_what_lies_before(self):
        """Those of the model with the same weights in full precision."""
        model, wide = quantized(), full()
        for path, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                wide.get_submodule(path).weight.data = dequantize(
                    layer.quantized_weight, torch.float32
                )
        grads = []
        for one in (model, wide):
            one.pos_emb.requires_grad_(True)
            weigh(one(some_ids())).backward()
            grads.append(one.pos_emb.weight.grad)
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)

    def test_a_weight_cannot_be_trained(self):
        model = quantized(tied=True)
        for layer in (model.out_head, model.tok_emb):
            with pytest.raises(RuntimeError, match=r"held in int8 and cannot be trained: train a"):
                layer.requires_grad_(True)
            layer.requires_grad_(False)
        with pytest.raises(RuntimeError, match="no weight to initialise"):
            model.out_head.reset_parameters()
        model.requires_grad_(True)  # what is in full precision can
        assert all(p.requires_grad for p in model.parameters())
        assert not any(b.requires_grad for b in model.buffers())


def hook(model):
    model.trf_blocks[1].att.W_key.register_forward_hook(lambda *args: None)


def lora(model):
    put_lora(model.trf_blocks[1])


def subclass(model):
    model.out_head.__class__ = type("Mine", (nn.Linear,), {})


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.trf_blocks[0].ff.layers[2])


def forward_of_its_own(model):
    model.out_head.forward = lambda x: x


def wrapped_weight(model):
    wrap_weight(model.out_head)


def foreign_block(model):
    model.trf_blocks[0] = nn.Sequential(nn.Linear(96, 96), nn.Bilinear(2, 2, 2))


def hooked_table(model):
    model.out_head.weight = model.tok_emb.weight
    model.tok_emb.register_forward_hook(lambda *args: None)


def renormalised_table(model):
    model.out_head.weight = model.tok_emb.weight
    model.tok_emb.max_norm = 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (hook, "trf_blocks.1.att.W_key cannot be quantised: a forward hook"),
        (lora, "trf_blocks.1.att.W_query cannot be quantised: a Beside (and 5 more layers)"),
        (subclass, "out_head cannot be quantised: a Mine"),
        (parametrised, "trf_blocks.0.ff.layers.2 cannot be quantised: a ParametrizedLinear"),
        (forward_of_its_own, "out_head cannot be quantised: a forward of its own"),
        (wrapped_weight, "out_head cannot be quantised: a weight that is not a plain parameter"),
        (foreign_block, "trf_blocks.0.1 cannot be quantised: a Bilinear"),
        (hooked_table, "tok_emb cannot be quantised: a forward hook"),
        (renormalised_table, "tok_emb cannot be quantised: a max_norm"),
    ],
)
def test_layers_that_cannot_be_quantised(change, said):
    model = full()
    change(model)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=re.escape(said)):
        fastgpt.quantize(model, "int8")
    assert [type(m) for m in model.modules()] == kinds


def test_hooks_elsewhere_stay():
    model, seen = full(), []
    model.trf_blocks[0].norm1.register_forward_hook(lambda *args: seen.append(1))
    logits(fastgpt.quantize(model, "int8"))
    assert seen == [1]


def test_what_cannot_be_quantised():
    for given, options, error, said in (
        (full(), {"precision": "int3"}, ValueError, "unknown precision 'int3', expected one of"),
        (full(), {"precision": "int4", "group": 16}, ValueError, "a group of 16 is not possible"),
        (
            full(),
            {"precision": "int4", "group": 64},
            ValueError,
            "W_query.weight cannot be quanti",
        ),
        (quantized(), {"precision": "int8"}, TypeError, "W_query cannot be quantised: already in "),
        (nn.Linear(2, 2), {"precision": "int8"}, TypeError, "a Linear cannot be quantised, only"),
    ):
        with pytest.raises(error, match=said):
            fastgpt.quantize(given, **options)
    model = full()
    model.trf_blocks[1].ff.layers[0].weight.data[7, 7] = torch.nan
    with pytest.raises(
        ValueError, match=r"trf_blocks.1.ff.layers.0.weight cannot be quantised to int8: it has val"
    ):
        fastgpt.quantize(model, "int8")
    model = full()
    model.final_norm.bfloat16()
    with pytest.raises(ValueError, match=r"float32.*final_norm.scale is bfloat16"):
        fastgpt.quantize(model, "int8")


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
