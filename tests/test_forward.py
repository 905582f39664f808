"""The whole pass in one call: sizes around every tile, layouts of weights, what it leaves alone."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import FUSED, assert_as_exact, use_path
from torch import nn

import fastgpt
from fastgpt import cpu, reference
from fastgpt.cpu import forward as engine
from fastgpt.cpu import workspace

pytestmark = pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing))


def _models(**changes):
    config = {
        "vocab_size": 61,
        "context_length": 300,
        "emb_dim": 48,
        "n_heads": 3,
        "n_layers": 2,
        "drop_rate": 0.0,
        "qkv_bias": True,
        **changes,
    }
    ours, book = fastgpt.GPTModel(config).eval(), reference.GPTModel(config).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    book.load_state_dict(ours.state_dict())
    return ours, book


@torch.no_grad()
def _check(ours, book, idx):
    got, theirs = ours(idx), book(idx)
    exact = copy.deepcopy(book).double()(idx)
    assert_as_exact(got, theirs, exact)
    return got


@pytest.fixture
def calls(monkeypatch):
    """How many blocks each call into C++ ran, and whether it went on to the logits."""
    made = []
    whole = engine._Stream._call

    def call(self, out, norm, head, last_only):
        made.append((self.n_blocks, out is not None))
        whole(self, out, norm, head, last_only)

    monkeypatch.setattr(engine._Stream, "_call", call)
    return made


@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("shape", [
    (1, 1), (1, 2), (3, 1), (1, 5), (2, 4), (1, 7), (1, 9), (1, 16), (1, 17), (5, 5), (1, 31),
    (3, 21), (1, 64), (1, 65), (2, 48), (1, 129), (1, 300), (7, 50),
])  # fmt: skip
def test_rows(path, shape, calls):
    ours, book = _models()
    with use_path(path):
        _check(ours, book, torch.randint(0, 61, shape))
    assert calls == [(2, True)]


@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize(
    ("width", "heads", "vocab"),
    [(6, 1, 31), (10, 2, 17), (16, 1, 16), (60, 4, 49), (64, 2, 256), (96, 1, 97), (160, 2, 1000)],
)
def test_sizes(path, tokens, width, heads, vocab, calls):
    ours, book = _models(emb_dim=width, n_heads=heads, vocab_size=vocab, n_layers=1)
    with use_path(path):
        _check(ours, book, torch.randint(0, vocab, (2, tokens)))
    assert calls == [(1, True)]


@pytest.mark.parametrize("path", FUSED[-1:])
@pytest.mark.parametrize("tokens", [3, 70])
def test_gpt2_width_and_vocabulary(path, tokens):
    ours, book = _models(emb_dim=768, n_heads=12, vocab_size=50257, n_layers=1)
    with use_path(path):
        _check(ours, book, torch.randint(0, 50257, (1, tokens)))


def _column_major(module):
    weight = module.weight
    module.weight = nn.Parameter(weight.detach().t().contiguous().t())


@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 30), (2, 70)])
@pytest.mark.parametrize("bias", [True, False])
def test_layouts_of_weights(path, shape, bias, calls):
    """Column-major as the book's loader leaves them, and views of a packed block."""
    ours, book = _models(qkv_bias=bias)
    first, second = ours.trf_blocks
    for module in (first.att.W_key, first.att.out_proj, first.ff.layers[0], first.ff.layers[2]):
        _column_major(module)
    packed = torch.cat([second.att.W_query.weight, second.att.W_value.weight], dim=1).detach()
    second.att.W_query.weight, second.att.W_value.weight = map(nn.Parameter, packed.split(48, 1))
    _column_major(ours.out_head)
    with use_path(path):
        _check(ours, book, torch.randint(0, 61, shape))
    assert calls == [(2, True)]


def test_tied_head_and_int32_and_strided_ids(calls):
    ours, book = _models()
    ours.out_head.weight, book.out_head.weight = ours.tok_emb.weight, book.tok_emb.weight
    idx = torch.randint(0, 61, (20, 2))
    got = _check(ours, book, idx.t())
    with torch.no_grad():
        assert torch.equal(ours(idx.t().int()), got)
        assert torch.equal(ours(idx.t().contiguous().to(torch.uint8)), got)
    assert len(calls) == 3


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _double(model):
    layers = model.trf_blocks[2].ff.layers
    linear = Doubled(48, 192)
    linear.load_state_dict(layers[0].state_dict())
    layers[0] = linear


CHANGES = {
    "block hook": (lambda m: m.trf_blocks[1].register_forward_hook(lambda *a: None), 2),
    "linear hook": (lambda m: m.trf_blocks[0].att.W_key.register_forward_hook(lambda *a: None), 2),
    "embedding hook": (lambda m: m.tok_emb.register_forward_hook(lambda *a: None), 1),
    "norm hook": (lambda m: m.final_norm.register_forward_hook(lambda *a: None), 1),
    "subclass": (_double, 2),
    "head": (lambda m: setattr(m, "out_head", nn.Sequential(m.out_head, nn.Tanh())), 1),
    "eps": (lambda m: setattr(m.trf_blocks[0].norm1, "eps", 1e-3), 2),
    "expanded": (lambda m: setattr(m.trf_blocks[1].att.W_query, "weight", _expanded()), 2),
    "mask": (lambda m: setattr(m.trf_blocks[1].att, "mask", torch.zeros(300, 300)), 2),
}


def _expanded():
    return nn.Parameter(torch.ones(1, 1).expand(48, 48))


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_piece_runs_alone(change, calls):
    ours, book = _models(n_layers=3)
    apply, expected = CHANGES[change]
    apply(ours), apply(book)
    _check(ours, book, torch.randint(0, 61, (2, 9)))
    assert len(calls) == expected


def test_what_a_hook_keeps_is_not_overwritten():
    ours, _ = _models(n_layers=3)
    kept = []
    ours.trf_blocks[1].register_forward_hook(lambda m, args, out: kept.extend((args[0], out)))
    with torch.no_grad():
        ours(torch.randint(0, 61, (2, 9)))
        copies = [t.clone() for t in kept]
        ours(torch.randint(0, 61, (2, 9)))
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=False))


def test_gradients_leave_it_alone(calls):
    ours, _ = _models()
    idx = torch.randint(0, 61, (1, 4))
    assert ours(idx).requires_grad
    ours.requires_grad_(False)  # a hook or a module between may still bring some in
    assert not ours(idx).requires_grad
    assert not calls
    with torch.inference_mode():
        ours(idx)
    assert len(calls) == 1


def test_ids_out_of_range():
    ours, _ = _models()
    for bad in (61, -1, 1 << 40):
        with torch.no_grad(), pytest.raises(IndexError, match=rf"{bad}.*61"):
            ours(torch.tensor([[1, bad, 2]]))


def test_workspaces_go_with_the_model():
    ours, _ = _models()
    with torch.no_grad():
        ours(torch.randint(0, 61, (1, 4)))
    assert weakref.ref(ours) in workspace._idle
    gc.collect()
    count = len(workspace._idle)
    twin = copy.deepcopy(ours)
    assert weakref.ref(twin) not in workspace._idle
    del ours
    gc.collect()
    assert len(workspace._idle) == count - 1


def test_the_same_bits_again_and_for_earlier_tokens():
    ours, _ = _models()
    idx = torch.randint(0, 61, (2, 120))
    with torch.no_grad():
        got = ours(idx)
        kept = got.clone()
        assert torch.equal(ours(idx), got)
        changed = idx.clone()
        changed[:, 70:] = (changed[:, 70:] + 1) % 61
        assert torch.equal(ours(changed)[:, :70], kept[:, :70])
    assert torch.equal(got, kept)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_give_the_same_bits(threads):
    ours, _ = _models(emb_dim=96, vocab_size=300)
    idx = torch.randint(0, 61, (2, 120))
    before = torch.get_num_threads()
    with torch.no_grad():
        got = ours(idx)
        try:
            torch.set_num_threads(threads)
            assert torch.equal(ours(idx), got)
        finally:
            torch.set_num_threads(before)


def test_not_a_number_stays_in_its_sequence():
    ours, _ = _models()
    with torch.no_grad():
        ours.tok_emb.weight[7] = torch.nan
        idx = torch.randint(8, 61, (2, 30))
        idx[1, 20] = 7
        got = ours(idx)
    assert got[0].isfinite().all()
    assert got[1, 20:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(shape):
    ours, _ = _models()
    with torch.no_grad():
        assert ours(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, 61)


@pytest.mark.parametrize("default", ["dtype", "device"])
def test_torchs_defaults_do_not_matter(default, calls):
    ours, _ = _models()
    idx = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        expected, tokens = ours(idx), fastgpt.generate_text_simple(ours, idx, 4, 300)
        try:
            if default == "dtype":
                torch.set_default_dtype(torch.float64)
            else:
                torch.set_default_device("meta")
            got, again = ours(idx), fastgpt.generate_text_simple(ours, idx, 4, 300)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    assert torch.equal(again, tokens)
