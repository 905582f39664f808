"""The whole pass and cached generation in bfloat16 and float16, and under autocast."""

import contextlib
import copy
import itertools

import pytest
import torch
from helpers import FUSED, assert_as_exact, use_path
from test_forward import _column_major, _models
from test_forward import calls as calls  # how many blocks each call into C++ ran
from torch import nn

import fastgpt
from fastgpt import cpu

pytestmark = pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing))
# A piece that is called runs PyTorch's own operations, and says so.
CALLED = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
NARROW = [torch.bfloat16, torch.float16]


def narrow_models(dtype, **changes):
    """One in this dtype, and the book's in it: the same numbers."""
    ours, book = (model.to(dtype) for model in _models(**changes))
    return ours, book


def check(got, book, idx):
    """The error rule at the dtype: against the same numbers in float64."""
    exact = copy.deepcopy(book).double()(idx)
    assert got.dtype is next(book.parameters()).dtype
    assert_as_exact(got, book(idx), exact)


@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 1), (1, 5), (2, 9), (1, 17), (3, 21), (1, 129), (7, 90)]
)
@torch.no_grad()
def test_rows(path, dtype, shape, calls):
    """On either side of where the products change their way and of the blocks of rows."""
    ours, book = narrow_models(dtype)
    idx = torch.randint(0, 61, shape)
    with use_path(path):
        check(ours(idx), book, idx)
    assert calls == [(2, True)]


@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("tokens", [2, 6, 40])
@pytest.mark.parametrize(("width", "heads", "vocab"), [(5, 1, 31), (30, 2, 17), (810, 2, 49)])
@torch.no_grad()
def test_odd_sizes(path, dtype, tokens, width, heads, vocab, calls):
    """Odd widths end in half a pair; the widest sums its logits in parts."""
    ours, book = narrow_models(dtype, emb_dim=width, n_heads=heads, vocab_size=vocab, n_layers=1)
    idx = torch.randint(0, vocab, (2, tokens))
    with use_path(path):
        check(ours(idx), book, idx)
    assert calls == [(1, True)]


@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 30), (2, 70)])
@torch.no_grad()
def test_layouts_of_weights(path, dtype, shape, calls):
    """Column-major as the book's loader leaves them, and views of a packed block."""
    ours, book = narrow_models(dtype)
    first, second = ours.trf_blocks
    for module in (first.att.W_key, first.att.out_proj, first.ff.layers[0], first.ff.layers[2]):
        _column_major(module)
    packed = torch.cat([second.att.W_query.weight, second.att.W_value.weight], dim=1)
    second.att.W_query.weight, second.att.W_value.weight = map(nn.Parameter, packed.split(48, 1))
    _column_major(ours.out_head)
    idx = torch.randint(0, 61, shape)
    with use_path(path):
        check(ours(idx), book, idx)
    assert calls == [(2, True)]


@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 1, 30), (40, 20)])
@torch.no_grad()
def test_cached(path, dtype, pieces):
    """The caches are in the model's dtype, and few or many new tokens read them."""
    ours, book = narrow_models(dtype)
    idx = torch.randint(0, 61, (2, sum(pieces)))
    cache = fastgpt.KVCache(2)
    ends = list(itertools.accumulate(pieces))
    with use_path(path):
        parts = [ours(idx[:, e - n : e], cache=cache) for e, n in zip(ends, pieces, strict=True)]
    assert all(t.dtype is dtype for pair in cache.get_all() for t in pair)
    check(torch.cat(parts, 1), book, idx)


@pytest.mark.parametrize("dtype", NARROW)
@torch.no_grad()
def test_a_cache_of_another_dtype_is_refused(dtype):
    ours, _ = narrow_models(dtype)
    cache = fastgpt.KVCache(2)
    copy.deepcopy(ours).float()(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match=r"the cache holds .* in torch.float32, this model takes"):
        ours(torch.tensor([[3]]), cache=cache)
    assert cache.get(0)[0].shape[2] == 2


@CALLED
@pytest.mark.parametrize("dtype", NARROW)
@torch.no_grad()
def test_pieces_that_are_called_get_the_models_dtype(dtype, calls):
    ours, book = narrow_models(dtype, n_layers=3)
    seen = []
    hook = ours.trf_blocks[1].register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    idx = torch.randint(0, 61, (2, 20))
    got = ours(idx)
    assert [t.dtype for t in seen[0]] == [dtype, dtype]
    assert calls == [(1, False), (1, True)]
    check(got, book, idx)
    hook.remove()
    ours.trf_blocks[2].att.W_key = nn.Linear(48, 48, dtype=dtype)  # still plain
    ours.out_head = nn.Sequential(ours.out_head, nn.Tanh())
    book.trf_blocks[2].att.W_key = ours.trf_blocks[2].att.W_key
    book.out_head = ours.out_head
    check(ours(idx), book, idx)


@torch.no_grad()
def test_never_a_stale_weight():
    ours, book = narrow_models(torch.bfloat16)
    idx = torch.randint(0, 61, (2, 30))
    ours(idx)
    for model in (ours, book):
        model.trf_blocks[1].ff.layers[0].weight.data.mul_(-2)
    check(ours(idx), book, idx)


@CALLED
@torch.no_grad()
def test_mixed_dtypes_are_left_to_pytorch(calls):
    """A block in another dtype is called as a module, which says what does not fit."""
    ours, _ = narrow_models(torch.bfloat16)
    ours.trf_blocks[1].float()
    with pytest.raises(RuntimeError, match="dtype"):
        ours(torch.randint(0, 61, (2, 5)))


@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_generation_continues_greedily(path, tied):
    """Each token is the greatest of the logits, or as good as that at the dtype."""
    ours, book = narrow_models(torch.bfloat16)
    if tied:
        ours.out_head.weight, book.out_head.weight = ours.tok_emb.weight, book.tok_emb.weight
    idx = torch.randint(0, 61, (2, 7))
    with use_path(path):
        out = fastgpt.generate_text_simple(ours, idx, 20, 300)
    logits = copy.deepcopy(book).double()(out)[:, 6:-1]
    chosen = logits.gather(-1, out[:, 7:, None]).squeeze(-1)
    error = (book(out).double()[:, 6:-1] - logits).abs().max()
    assert (logits.amax(-1) - chosen <= 4 * error).all()  # twice the error of each of the two


@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (3, 40)])
@torch.no_grad()
def test_autocast(path, shape, calls):
    """Over float32 parameters: PyTorch's bfloat16 products are the measure of the error."""
    ours, book = _models()
    idx = torch.randint(0, 61, shape)
    cache = fastgpt.KVCache(2)
    with use_path(path), torch.autocast("cpu", dtype=torch.bfloat16):
        got, theirs, cached = ours(idx), book(idx), ours(idx, cache=cache)
    assert got.dtype is theirs.dtype is cached.dtype is torch.bfloat16
    assert cache.get(1)[0].dtype is torch.bfloat16
    assert calls == [(2, True), (2, True)]
    exact = copy.deepcopy(book).double()(idx)
    assert_as_exact(got, theirs, exact)
    assert_as_exact(cached, theirs, exact)


@CALLED
@torch.no_grad()
def test_autocast_to_float16_is_left_to_pytorch(calls):
    ours, book = _models()
    idx = torch.randint(0, 61, (2, 9))
    with torch.autocast("cpu", dtype=torch.float16):
        got, theirs = ours(idx), book(idx)
    assert not calls
    assert_as_exact(got, theirs, copy.deepcopy(book).double()(idx))


@pytest.mark.parametrize("dtype", NARROW)
@torch.no_grad()
def test_not_a_number_goes_through(dtype):
    ours, _ = narrow_models(dtype)
    ours.trf_blocks[0].ff.layers[2].bias[3] = torch.nan
    assert ours(torch.randint(0, 61, (2, 5))).isnan().all()
    ours, _ = narrow_models(dtype)
    ours.out_head.weight[7, 0] = torch.inf
    got = ours(torch.randint(0, 61, (3, 30)))
    assert got[..., 7].isinf().all()
    assert got[..., :7].isfinite().all()


def test_explained(capsys):
    ours, _ = narrow_models(torch.bfloat16)
    fastgpt.explain(ours)
    out = capsys.readouterr().out
    assert "bfloat16 on cpu: backend cpu" in out
    assert "the whole pass is one call into C++" in out
    assert "2 of 2 blocks as one operation each, the rest by PyTorch's own operations" in out


def gradients(model, idx, targets, loss=None):
    """Of the mean cross entropy, by parameter."""
    if loss is None:
        logits = model(idx).float().flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, targets.flatten())
    model.zero_grad()
    loss.backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters()}


def check_gradients(ours, book, idx, autocast=None):
    """By the error rule, in norm: gradients are sums over rows."""
    targets = torch.randint(0, 61, idx.shape)
    exact = gradients(copy.deepcopy(book).double(), idx, targets)
    with contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        block = ours.trf_blocks[0](ours.tok_emb(idx))
        assert "_TransformerBlock" in block.grad_fn.name()
        loss = ours.loss(idx, targets)
        theirs = gradients(book, idx, targets)
    got = gradients(ours, idx, targets, loss)
    for name, right in exact.items():
        assert got[name].dtype is ours.get_parameter(name).dtype
        error, measure = ((g[name].double() - right).norm() for g in (got, theirs))
        assert error <= 2 * measure + 1e-3 * right.norm(), name


@CALLED
@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(1, 3), (2, 9), (3, 43), (2, 300)])
def test_a_training_step(path, dtype, shape):
    ours, book = narrow_models(dtype)
    with use_path("auto"), cpu.use_isa(path.removeprefix("cpu-")):
        check_gradients(ours, book, torch.randint(0, 61, shape))


@CALLED
@pytest.mark.parametrize("dtype", NARROW)
def test_a_training_step_over_layouts_and_odd_sizes(dtype):
    ours, book = narrow_models(dtype, emb_dim=30, n_heads=2)
    for module in (ours.trf_blocks[0].att.W_key, ours.trf_blocks[0].ff.layers[0]):
        _column_major(module)
    check_gradients(ours, book, torch.randint(0, 61, (3, 37)))


@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("shape", [(1, 3), (3, 43), (2, 300)])
@CALLED
def test_a_training_step_under_autocast(path, shape):
    ours, book = _models()
    with use_path("auto"), cpu.use_isa(path.removeprefix("cpu-")):
        check_gradients(ours, book, torch.randint(0, 61, shape), torch.bfloat16)


@CALLED
def test_dropout_is_that_of_the_modules():
    """One seed, one mask, whichever path computes it."""
    ours, _ = narrow_models(torch.bfloat16, drop_rate=0.3)
    ours.train()
    idx = torch.randint(0, 61, (2, 40))
    found = []
    for watched in (False, True):
        if watched:  # takes the blocks apart
            for block in ours.trf_blocks:
                block.ff.register_forward_hook(lambda *args: None)
        torch.manual_seed(7)
        found.append(ours(idx).double())
    assert (found[0] - found[1]).abs().max() < 0.05 * found[1].abs().max()
