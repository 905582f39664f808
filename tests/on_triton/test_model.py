"""The model on interpreted kernels, and against a GPU that is not there."""

import collections
import contextlib
import copy
import io
import pickle
import sys
import types

import pytest
import torch
from helpers import assert_as_exact, assert_small_rms
from pairs import CONFIG as CFG
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import fastgpt
from fastgpt import dispatch, ops, reference, triton
from fastgpt.model import scoring
from on_triton.support.gpu import fake_gpu

# PyTorch's own.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")
BF16 = torch.bfloat16
NO_DRIVER = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="the compiler of a torch with CUDA asks the driver, which is not there",
)
# The package has the function of this name.
packed_linear = sys.modules["fastgpt.ops.packed_linear"]


@contextlib.contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _pair(dtype=torch.float32, **changes):
    models = []
    for module in (fastgpt, reference):
        torch.manual_seed(5)
        models.append(module.GPTModel(CFG | changes).to(dtype))
    return models


def _loss_and_grads(model, ids, forward=None):
    model.zero_grad()
    logits = (forward or model)(ids[:, :-1])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
def test_forward_and_backward(dtype):
    ours, book = _pair(dtype, drop_rate=0.0, n_layers=1)
    exact = reference.GPTModel(CFG | {"drop_rate": 0.0, "n_layers": 1}).double()
    exact.load_state_dict(book.state_dict())
    ids = torch.randint(0, CFG["vocab_size"], (2, 10))
    found = [_loss_and_grads(model, ids) for model in (ours, book, exact)]
    names = ["loss", *(name for name, _ in ours.named_parameters())]
    for name, mine, theirs, right in zip(names, *found, strict=True):
        assert_small_rms(mine, theirs, right, name)
        if dtype == torch.float32:
            assert_as_exact(mine, theirs, right, name)
    torch.testing.assert_close(ours.loss(ids[:, :-1], ids[:, 1:]), found[0][0])


def _weights(block):
    return [m.weight for m in (block.att.W_query, block.att.W_key, block.att.W_value)]


def _pack(model):
    for block in model.trf_blocks:
        packed_linear.lay_side_by_side(_weights(block))


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize("bias", [True, False])
def test_one_product_for_queries_keys_and_values(monkeypatch, bias):
    ours, book = _pair(drop_rate=0.0, n_layers=1, qkv_bias=bias)
    before = dict(ours.named_parameters())
    _pack(ours)
    assert all(before[name] is p for name, p in ours.named_parameters())
    for name, value in book.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    joined = []
    original = packed_linear._joined
    monkeypatch.setattr(
        packed_linear, "_joined", lambda dys: joined.append((dys, original(dys))) or joined[-1][1]
    )
    ids = torch.randint(0, CFG["vocab_size"], (2, 10))
    for mine, theirs in zip(*(_loss_and_grads(m, ids) for m in (ours, book)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    ((dys, dy),) = joined
    assert dy.data_ptr() == dys[0].data_ptr()  # nothing was copied
    frozen = ours.trf_blocks[0].att.W_key.weight.requires_grad_(False)
    frozen.grad = None
    _loss_and_grads(ours, ids)
    assert frozen.grad is None


def _saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved_and_loaded,
    "another dtype": lambda model: model.to(BF16),
    "the same dtype": lambda model: model.to(torch.float32),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_weights_stay_side_by_side(monkeypatch, copied):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    model = fastgpt.GPTModel(CFG)
    expected = [p.detach().clone() for p in model.parameters()]
    again = copied(model)
    for block in again.trf_blocks:
        weights = _weights(block)
        assert packed_linear.side_by_side(weights)
        assert weights[0].untyped_storage().nbytes() == 3 * weights[0].nbytes
    for mine, before in zip(again.parameters(), expected, strict=True):
        assert torch.equal(mine, before.to(mine.dtype))


def test_assigned_weights_lie_as_in_the_state_dict(monkeypatch):
    model = fastgpt.GPTModel(CFG)  # made on the CPU, so not packed
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assigned = fastgpt.GPTModel(CFG)
    assigned.load_state_dict(model.state_dict(), assign=True)
    for block, given in zip(assigned.trf_blocks, model.trf_blocks, strict=True):
        assert not packed_linear.side_by_side(_weights(block))
        for mine, theirs in zip(_weights(block), _weights(given), strict=True):
            assert mine.data_ptr() == theirs.data_ptr()
    assert packed_linear.side_by_side(_weights(copy.deepcopy(assigned).trf_blocks[0]))


def test_weights_that_others_may_hold_are_not_moved(monkeypatch):
    block = fastgpt.GPTModel(CFG).trf_blocks[0]
    width = CFG["emb_dim"]
    held = torch.randn(width, 3 * width)
    for i, layer in enumerate((block.att.W_query, block.att.W_key, block.att.W_value)):
        layer.weight = torch.nn.Parameter(held[:, i * width : (i + 1) * width].T)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    loaded, again = _saved_and_loaded((block, held))
    again.fill_(2.0)
    assert all((w == 2).all() for w in _weights(loaded))
    del block.att.W_key  # as a subclass with one projection might
    assert copy.deepcopy(block).att.W_query.weight.shape == (width, width)


@pytest.mark.usefixtures("dispatched")
def test_one_product_differentiated_twice():
    att = fastgpt.GPTModel(CFG | {"n_layers": 1}).trf_blocks[0].att
    layers = (att.W_query, att.W_key, att.W_value)
    x, inputs = torch.randn(1, 4, CFG["emb_dim"]), [m.weight for m in layers]
    found = []
    for _ in range(2):
        q, k, v = att._projected(x)
        grads = torch.autograd.grad((q * k * v).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))
        packed_linear.lay_side_by_side(inputs)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("dispatched")
def test_autocast():
    ours, book = _pair(drop_rate=0.0, n_layers=1)
    ids = torch.randint(0, CFG["vocab_size"], (2, 10))
    found = []
    for model in (ours, book):
        with torch.autocast("cpu", BF16):
            found.append(_loss_and_grads(model, ids, model))
    exact = _loss_and_grads(book.double(), ids)
    for mine, theirs, right in zip(*found, exact, strict=True):
        assert mine.dtype == torch.float32
        assert_small_rms(mine, theirs, right)


@pytest.mark.usefixtures("dispatched")
def test_the_norm_under_autocast_has_the_products_dtype():
    """Where nothing but products read it."""
    x, branch = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 5, 32).to(BF16)
    branch.requires_grad_()
    norm = fastgpt.model.modules.LayerNorm(32)
    found = []
    for narrow in (False, True):
        with torch.autocast("cpu", BF16):
            given = (x, branch, norm.scale, norm.shift)
            y, total = ops.add_layer_norm(*given, narrow=narrow)
        assert total.dtype == torch.float32
        assert y.dtype == (BF16 if narrow else torch.float32)
        # As the cast in front of a product would have it.
        loss = (y.to(BF16).float() * x.detach().sin()).sum() + total.square().sum()
        found.append((y.to(BF16), total, *torch.autograd.grad(loss, given)))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize("hooked", [None, "att.W_query", "ff"])
def test_what_is_hooked_sees_the_norm_as_pytorch_makes_it(monkeypatch, hooked):
    ours, _ = _pair(drop_rate=0.0, n_layers=2)
    seen, product = [], ops.linear_gelu
    if hooked:
        module = ours.trf_blocks[1].get_submodule(hooked)
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    else:

        def linear_gelu(x, *rest, **how):
            seen.append(x.dtype)
            return product(x, *rest, **how)

        monkeypatch.setattr(ops, "linear_gelu", linear_gelu)
    with torch.autocast("cpu", BF16):
        ours.loss(*[torch.randint(0, CFG["vocab_size"], (2, 10))] * 2).backward()
    assert set(seen) == {torch.float32 if hooked else BF16}


@pytest.mark.usefixtures("dispatched")
def test_dropout_repeats_and_drops():
    ours, _ = _pair(drop_rate=0.4, n_layers=1)
    ids = torch.randint(0, CFG["vocab_size"], (2, 10))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(_loss_and_grads(ours, ids))
    for first, again in zip(*found[:2], strict=True):
        assert torch.equal(first, again)
    assert not torch.equal(found[0][0], found[2][0])


@pytest.mark.usefixtures("dispatched")
def test_ids_outside_the_vocabulary():
    ours, _ = _pair(n_layers=1)
    ids = torch.tensor([[1, CFG["vocab_size"]]])
    with pytest.raises(IndexError, match=f"token id {CFG['vocab_size']} is outside"):
        ours(ids)
    with pytest.raises(IndexError, match="target -1 is outside"):
        ours.loss(ids - 1, ids - ids - 1)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_a_training_step_on_a_gpu_that_is_not_there(dispatched, monkeypatch, arch):
    monkeypatch.setattr(dispatch, "direct", lambda tensors: True)
    monkeypatch.setattr(dispatch, "readable", lambda t: False)
    for name in ("embedding", "causal_attention", "layer_norm"):
        monkeypatch.setattr(sys.modules[f"fastgpt.ops.{name}"], "draw_seed", lambda *p: 7)
    monkeypatch.setattr(sys.modules["fastgpt.ops.embedding"], "check_ids", lambda idx, size: None)
    with fake_gpu(arch) as launches:
        with _default_dtype(BF16):
            model = fastgpt.GPTModel(fastgpt.GPT_CONFIG_124M | {"n_layers": 1})
        ids = torch.zeros(8, 1024, dtype=torch.int64)
        # For a mean the CPU's tensors would be asked for the loss's gradient.
        model.loss(ids, ids, reduction="none").backward(torch.ones(8, 1024))
        shapes = [(p.grad.shape, p.grad.dtype) for p in model.parameters()]
        assert shapes == [(p.shape, p.dtype) for p in model.parameters()]
    names = {launch.name for launch in launches}
    assert names >= {
        "embedding_fwd_kernel",
        "token_bwd_kernel",
        "layer_norm_fwd_kernel",
        "layer_norm_bwd_kernel",
        "causal_attention_fwd_kernel",
        "causal_attention_bwd_dq_kernel",
        "causal_attention_bwd_dkdv_kernel",
        "bias_gelu_bwd_kernel",
        "cross_entropy_fwd_kernel",
        "cross_entropy_bwd_kernel",
    }


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_scores_on_a_gpu_that_is_not_there(dispatched, monkeypatch, arch):
    monkeypatch.setattr(dispatch, "direct", lambda tensors: True)
    monkeypatch.setattr(dispatch, "readable", lambda t: False)
    for name in ("as_id_list", "check_ids"):  # a fake tensor has no numbers to look at
        monkeypatch.setattr(scoring, name, lambda ids, rest: ids)
    with fake_gpu(arch) as launches:
        with _default_dtype(BF16):
            model = fastgpt.GPTModel(fastgpt.GPT_CONFIG_124M | {"n_layers": 1}).eval()
        scores = fastgpt.score(model, [list(range(n)) for n in (1024, 33, 700)])
        assert [len(one) for one in scores] == [1023, 32, 699]
    names = [launch.name for launch in launches]
    assert names.count("causal_attention_fwd_kernel") == 1
    assert names.count("cross_entropy_fwd_kernel") == 1


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of that capability, as far as torch tells."""

    def with_capability(*capability):
        triton.reason.cache_clear()
        dispatch._say.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(triton, "launch_failure", lambda device: None)
        card = types.SimpleNamespace(major=capability[0], minor=capability[1], name="Tesla T4")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index=None: card)

    yield with_capability
    triton.reason.cache_clear()
    dispatch._say.cache_clear()


def test_an_old_gpu_is_passed_over_with_one_warning(gpu, monkeypatch, recwarn):
    gpu(7, 5)
    row = fastgpt.backends()["triton"]
    assert not row.available
    assert "need an sm_80 or newer, the Tesla T4 is an sm_75" in row.reason
    with pytest.raises(fastgpt.BackendError, match="sm_75"), fastgpt.use_backend("triton"):
        pass
    taken = dispatch._KERNELS["triton"]._replace(
        device="cpu", reason=lambda index: triton.reason(0)
    )
    monkeypatch.setitem(dispatch._KERNELS, "triton", taken)
    monkeypatch.setattr(dispatch, "_BY_DEVICE", {"cpu": "triton"})
    with torch.no_grad(), fastgpt.use_backend("auto"):
        for _ in range(2):
            fastgpt.ops.gelu(torch.ones(3))
            fastgpt.ops.layer_norm(torch.ones(3), torch.ones(3), torch.ones(3))
    assert [w.category for w in recwarn] == [fastgpt.BackendWarning]
    assert "triton backend" in str(recwarn[0].message)


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), False), ((8, 0), True)])
def test_the_graphs_of_an_old_gpu_have_nothing_opaque(gpu, monkeypatch, capability, taken):
    gpu(*capability)
    monkeypatch.setattr(dispatch, "_is_plain", lambda t: True)
    with FakeTensorMode():
        x = torch.empty(3, 5, dtype=BF16, device="cuda")
        assert dispatch.traceable("linear_cross_entropy", x, x) is taken


@NO_DRIVER
def test_the_compiler_may_ask_for_a_gpus_age(gpu, monkeypatch):
    gpu(7, 5)
    for name in ("get_rng_state", "set_rng_state"):  # the compiler keeps them
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)

    def ask(x):
        return x + triton.too_old_gpu(0)

    assert torch.compile(ask, backend="eager", fullgraph=True)(torch.zeros(1)) == 1


def test_a_new_gpu_is_taken(gpu):
    gpu(9, 0)
    assert fastgpt.backends()["triton"].available
    with fastgpt.use_backend("triton"):
        assert dispatch.requested() == "triton"


def test_with_several_gpus_launches_go_to_the_tensors_own(monkeypatch):
    current = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *error):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(dispatch, "_several_gpus", lambda: True)
    module = types.SimpleNamespace(launcher=lambda x, y=0: (x, y, *current))
    monkeypatch.setattr(dispatch, "_module", lambda backend, op: module)
    assert dispatch.Launchers("op", 3).launcher(1, y=2) == (1, 2, 3)
    assert current == []


@pytest.mark.parametrize(("device", "dtype"), [("cuda", BF16), ("cuda", torch.float64)])
def test_what_compiled_graphs_take(monkeypatch, device, dtype):
    monkeypatch.setattr(dispatch, "_is_plain", lambda t: True)
    with FakeTensorMode():
        x = torch.empty(3, dtype=dtype, device=device)
        assert dispatch.traceable("causal_attention", x, x) == (dtype == BF16)
        assert not dispatch.traceable("causal_attention", x, x.cpu())
        assert not dispatch.traceable("gelu", x)


@pytest.fixture
def graph_of(gpu, monkeypatch):
    """The operations in the graph of a call, in no_grad: a torch without CUDA keeps no gradients
    of CUDA tensors.
    """
    gpu(9, 0)
    for name in ("get_rng_state", "set_rng_state"):  # the compiler keeps them
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)

    def operations(f, *args):
        graphs = []
        if "torch._dynamo" in sys.modules:  # another file's graphs count against the limit
            torch.compiler.reset()
        with torch.no_grad():
            torch.compile(f, backend=lambda g, _: graphs.append(g) or g, fullgraph=True)(*args)
        (graph,) = graphs
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        names = (str(f) if "fastgpt" in str(f) else f.__name__ for f in called)
        return collections.Counter(names)

    return operations


@NO_DRIVER
@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
def test_a_gpus_graph_has_what_inductor_fuses(graph_of, drop_rate, dtype):
    model = fastgpt.GPTModel(CFG | {"drop_rate": drop_rate, "n_layers": 1})
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    there = torch.empty(p.shape, dtype=dtype, device="cuda")
                    module._parameters[name] = torch.nn.Parameter(there)
        ids = torch.zeros(2, 16, dtype=torch.int64, device="cuda")
        found, with_loss = graph_of(model, ids), graph_of(model.loss, ids, ids)
    expected = {"embedding": 2, "layer_norm": 3, "linear": 7, "gelu": 1, "add": 3}
    expected |= {"dropout": 3 if drop_rate else 0, "scaled_dot_product_attention": 1}
    assert {name: found[name] for name in expected} == expected
    assert not any("fastgpt" in name for name in found)
    expected["linear"] -= 1  # the head
    assert {name: with_loss[name] for name in expected} == expected
    own = {name: count for name, count in with_loss.items() if "fastgpt" in name}
    assert own == {"fastgpt.linear_cross_entropy": 1}
    assert with_loss["cross_entropy"] == 0


@NO_DRIVER
def test_a_gpus_graph_keeps_our_attention_behind_a_cache(graph_of):
    with FakeTensorMode():
        one, q, k = (torch.empty(2, 3, n, 16, dtype=BF16, device="cuda") for n in (1, 5, 9))
        assert graph_of(ops.causal_attention, q, k, k)["fastgpt.causal_attention"] == 1
        for q in (one, k):
            assert graph_of(ops.causal_attention, q, k, k)["scaled_dot_product_attention"] == 1
