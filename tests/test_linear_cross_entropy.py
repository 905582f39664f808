import contextlib
import sys

import pytest
import torch
from helpers import check_operation, opcheck
from pairs import CONFIG, Wrapped, assert_same, pair, some_ids, wrap_weight
from torch import nn
from torch.nn import functional as F

from fastgpt import GPTModel, cpu, dispatch
from fastgpt.ops import linear_cross_entropy

NARROW = (torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def _targets(n, vocab):
    targets = torch.randint(0, vocab, (n,))
    targets[::5] = -100
    targets[-1] = vocab - 1
    return targets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "width", "vocab"), [(1, 8, 3), (7, 48, 61), (70, 33, 700)])
def test_loss_and_gradients(path, reduction, rows, width, vocab):
    targets = _targets(rows, vocab)

    def theirs(x, weight):
        return F.cross_entropy(F.linear(x, weight), targets, reduction=reduction)

    def ours(x, weight):
        return linear_cross_entropy(x, weight, targets, reduction=reduction)

    upstream = [torch.randn(rows) if reduction == "none" else torch.tensor(-0.7)]
    check_operation(ours, theirs, [torch.randn(rows, width), torch.randn(vocab, width)], upstream)


def test_losses_of_confident_rows(path):
    """Are small beside the logits that they are differences of."""
    logits = 3 * torch.randn(64, 50) + 20
    logits[:, 7] = 40
    targets, eye = torch.full((64,), 7), torch.eye(50)
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    theirs = (F.cross_entropy(logits, targets, reduction="none") - exact).abs().max()
    ours = (linear_cross_entropy(logits, eye, targets, reduction="none") - exact).abs().max()
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps * exact.max()


def test_more_rows_than_a_chunk(path):
    """1100 rows are three chunks; large and tiny logits."""
    targets = _targets(1100, 50)
    x, weight = torch.randn(1100, 16) * 6, torch.randn(50, 16) * 3
    check_operation(
        lambda x, w: linear_cross_entropy(x, w, targets),
        lambda x, w: F.cross_entropy(F.linear(x, w), targets),
        [x, weight],
        [torch.ones(())],
    )


def test_logits_far_below_zero_do_not_underflow(path):
    x, weight = torch.full((3, 4), -100.0), torch.rand(17, 4) + 1
    loss = linear_cross_entropy(x, weight, torch.tensor([0, 8, 16]))
    torch.testing.assert_close(loss, F.cross_entropy(x @ weight.mT, torch.tensor([0, 8, 16])))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_graph_serves_twice_and_every_scale(path, reduction):
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets, grads = _targets(6, 11), []
    for f in (
        lambda: linear_cross_entropy(x, w, targets, reduction=reduction),
        lambda: F.cross_entropy(F.linear(x, w), targets, reduction=reduction),
    ):
        loss = f().sum()
        loss.backward(retain_graph=True)
        (loss / 3).backward()
        grads.append([x.grad, w.grad])
        x.grad = w.grad = None
    torch.testing.assert_close(*grads)


def test_every_target_ignored(path):
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    targets = torch.full((3,), 2)
    loss = linear_cross_entropy(x, w, targets, ignore_index=2)
    assert loss.isnan()  # as PyTorch has it: nothing divided by nothing
    loss.backward()
    assert torch.equal(w.grad, torch.zeros(5, 8))
    assert linear_cross_entropy(x, w, targets, ignore_index=2, reduction="sum") == 0


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_nothing_is_made_for_what_is_frozen(path, frozen):
    tensors = {"x": torch.randn(4, 6), "weight": torch.randn(5, 6)}
    for name, t in tensors.items():
        t.requires_grad_(name != frozen)
    linear_cross_entropy(*tensors.values(), torch.zeros(4, dtype=torch.int32)).backward()
    assert tensors[frozen].grad is None
    assert all(t.grad is not None for name, t in tensors.items() if name != frozen)


def test_empty(path):
    x, w = torch.randn(0, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64)
    linear_cross_entropy(x, w, targets, reduction="sum").backward()
    assert torch.equal(w.grad, torch.zeros(5, 6))
    assert linear_cross_entropy(x, w, targets).isnan()


def test_not_a_number_goes_through(path):
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    x[1, 2] = torch.nan
    losses = linear_cross_entropy(x, w, torch.zeros(4, dtype=torch.int64), reduction="none")
    assert losses.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("bad", [-1, 5, -101])
def test_a_label_outside_the_vocabulary_is_named(path, bad):
    targets = torch.tensor([1, bad, -100])
    with pytest.raises(IndexError, match=f"target {bad} is outside the vocabulary of 5"):
        linear_cross_entropy(torch.randn(3, 6), torch.randn(5, 6), targets)


def test_bad_arguments(path):
    x, w, t = torch.randn(3, 6), torch.randn(5, 6), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match="targets must be integers"):
        linear_cross_entropy(x, w, t.float())
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(x, w, t[:2])
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(x, w, t, reduction="median")
    with pytest.raises(ValueError, match="the targets are on meta"):
        linear_cross_entropy(x, w, t.to("meta"))


def test_second_derivative(path):
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    targets, seconds = torch.tensor([0, 4, 2, 2]), []
    for f in (linear_cross_entropy, lambda x, w, t: F.cross_entropy(F.linear(x, w), t)):
        grads = torch.autograd.grad(f(x, w, targets), (x, w), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w)))
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
def test_other_dtypes(dtype):
    x, w = (torch.randn(n, 16, dtype=dtype, requires_grad=True) for n in (9, 33))
    targets = _targets(9, 33)
    loss = linear_cross_entropy(x, w, targets)
    exact = F.cross_entropy(F.linear(x.double(), w.double()), targets)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(loss.double(), exact, **tolerance)
    for ours, right in zip(
        torch.autograd.grad(loss, (x, w)), torch.autograd.grad(exact, (x, w)), strict=True
    ):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, right, **tolerance)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
def test_the_weights_gradient_is_as_exact_over_many_chunks(dtype):
    targets = _targets(12_000, 7)
    check_operation(
        lambda x, w: linear_cross_entropy(x, w, targets),
        lambda x, w: F.cross_entropy(F.linear(x, w).float(), targets),
        [torch.randn(12_000, 8).to(dtype) + 1, torch.randn(7, 8).to(dtype)],
        [torch.ones(())],
    )


@pytest.mark.parametrize(
    ("rows", "size", "gap", "reduction", "scale"),
    [(2000, 100, 0, "mean", 16), (2000, 100, 0, "sum", 2**-10), (4, 1, 18, "mean", 2**16)],
    ids=["large, mean", "large, sum", "small"],
)
@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
def test_float16_gradients_are_made_at_the_scale_of_the_loss(rows, size, gap, reduction, scale):
    """Where they are finite and not zero; for a loss of scale 1 they would not be."""
    x = torch.full((rows, 1), size, dtype=torch.float16, requires_grad=True)
    w = torch.tensor([[0.0], [-gap / size]], dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    ours = linear_cross_entropy(x, w, targets, reduction=reduction)
    theirs = F.cross_entropy(F.linear(x, w).float(), targets, reduction=reduction)
    grads = [torch.autograd.grad(loss * scale, (x, w)) for loss in (ours, theirs)]
    assert grads[1][1].isfinite().all()
    assert grads[1][1].any()
    torch.testing.assert_close(*grads, rtol=0.01, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("changed", ["x", "weight", "targets"])
@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
def test_what_changes_before_backward_is_refused(changed, dtype, reduction):
    x, weight = (torch.randn(n, 16, dtype=dtype, requires_grad=True) for n in (9, 33))
    tensors = {"x": x, "weight": weight, "targets": _targets(9, 33)}
    loss = linear_cross_entropy(*tensors.values(), reduction=reduction).sum()
    with torch.no_grad():
        tensors[changed].mul_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_targets_of_any_integer_dtype(path, dtype):
    x, w, labels = torch.randn(5, 6), torch.randn(7, 6), torch.tensor([0, 3, 6, 3, 1])
    right = F.cross_entropy(F.linear(x, w), labels, ignore_index=3)
    assert_same(linear_cross_entropy(x, w, labels.to(dtype), ignore_index=3), right)
    with pytest.raises(IndexError, match="target 6 is outside the vocabulary of 5"):
        linear_cross_entropy(x, w[:5], labels.to(dtype))


WITHOUT_GRADIENTS = [torch.no_grad, torch.inference_mode, contextlib.nullcontext]


@pytest.mark.parametrize("without", WITHOUT_GRADIENTS, ids=["no_grad", "inference", "frozen"])
def test_no_gradient_is_made_where_none_is_recorded(path, monkeypatch, without):
    learns = without is not contextlib.nullcontext
    x, w = (torch.randn(n, 6, requires_grad=learns) for n in (4, 5))
    op = sys.modules[linear_cross_entropy.__module__]
    monkeypatch.setattr(op, "_gradients", None)
    targets = torch.tensor([0, 4, 2, 2])
    with without():
        loss = linear_cross_entropy(x, w, targets)
        assert not loss.requires_grad
        assert_same(loss, F.cross_entropy(F.linear(x, w), targets))


def test_a_wrapped_weight_multiplies_itself(path):
    x, w, targets = torch.randn(3, 6, requires_grad=True), torch.randn(5, 6), torch.arange(3)
    found = [
        torch.autograd.grad(linear_cross_entropy(x, weight, targets), x)
        for weight in (Wrapped(w), w)
    ]
    assert_same(*found)


# The model's own


def readers_loss(model, ids, targets, **options):
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), **options)


def change_nothing(model):
    pass


def tie(model):
    model.out_head.weight = model.tok_emb.weight


def two_classes(model):
    model.out_head = nn.Linear(CONFIG["emb_dim"], 61)


def hook(model):
    model.register_forward_hook(lambda module, args, logits: logits * 0.5)


def wrapped_head(model):
    model.out_head = nn.Sequential(model.out_head)


def wrapped_weight(model):
    wrap_weight(model.out_head)


def another_norm(model):
    model.final_norm = nn.LayerNorm(CONFIG["emb_dim"])


def hooked_norm(model):
    model.final_norm.register_forward_hook(lambda module, args, h: h * 0.5)


CHANGES = [change_nothing, tie, two_classes, hook, wrapped_head, wrapped_weight]


@pytest.mark.parametrize("change", CHANGES)
def test_the_models_loss(path, change):
    ours, book = pair()
    for model in (ours, book):
        torch.manual_seed(1)
        change(model)
    ids, targets = some_ids(), some_ids(seed=8)
    targets[0, :3] = -100
    results = []
    for loss, model in (
        (ours.loss(ids, targets), ours),
        (readers_loss(book, ids, targets), book),
    ):
        loss.backward()
        learning = [p for p in model.parameters() if p.requires_grad]
        results.append([loss.detach(), *(p.grad for p in learning)])
    assert_same(*results)


def test_the_models_loss_in_each_reduction(path):
    ours, book = pair()
    ids, targets = some_ids(), some_ids(seed=8)
    with torch.no_grad():
        for reduction in ("mean", "sum"):
            assert_same(
                ours.loss(ids, targets, reduction=reduction),
                readers_loss(book, ids, targets, reduction=reduction),
            )
        each = ours.loss(ids, targets, ignore_index=3, reduction="none")
        theirs = readers_loss(book, ids, targets, ignore_index=3, reduction="none")
        assert_same(each, theirs.view(ids.shape))


def test_what_the_models_loss_refuses():
    model, ids = pair()[0], some_ids()
    with pytest.raises(ValueError, match=r"targets \(2, 8\) must have the shape of the ids"):
        model.loss(ids, ids[:, 1:])
    with pytest.raises(IndexError, match="target 61 is outside the vocabulary of 61"):
        model.loss(ids, ids.where(ids != ids[0, 0], 61))
    with pytest.raises(IndexError, match="token id 61 is outside the vocabulary of 61"):
        model.loss(ids.where(ids != ids[0, 0], 61), ids)
    with pytest.raises(ValueError, match="33 tokens are more than the context length 32"):
        model.loss(some_ids(T=33), some_ids(T=33))
    with pytest.raises(TypeError, match="targets must be integers"):
        model.loss(ids, ids.float())
    with pytest.raises(TypeError, match="token ids must be a tensor"):
        model.loss([[1, 2]], [[2, 3]])


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_the_models_loss_of_any_integer_dtype(path, dtype):
    model, ids = pair()[0], some_ids()
    assert_same(model.loss(ids.to(dtype), ids.to(dtype)), readers_loss(model, ids, ids))


@pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing))
@pytest.mark.parametrize("change", [change_nothing, tie, another_norm, hooked_norm])
def test_without_gradients_all_below_the_head_is_one_pass(monkeypatch, change):
    models = pair()
    for model in models:
        torch.manual_seed(1)
        change(model)
    monkeypatch.setattr(GPTModel, "_features", None)
    ids = some_ids()
    with torch.no_grad():
        assert_same(models[0].loss(ids, ids), readers_loss(models[1], ids, ids))


def test_a_head_replaced_after_the_loss_is_seen():
    model, ids = pair()[0], some_ids()
    before = model.loss(ids, ids)
    with torch.no_grad():
        model.out_head.weight.mul_(2)
    after = model.loss(ids, ids)
    assert_same(after, readers_loss(model, ids, ids))
    assert abs((before - after).item()) > 1e-3


def test_the_models_loss_under_compile():
    model, ids = pair(n_layers=1)[0], some_ids()
    loss = torch.compile(model.loss, backend="eager", fullgraph=True)(ids, ids)
    assert_same(loss, readers_loss(model, ids, ids))


@pytest.fixture
def in_graphs(monkeypatch):
    """As on a GPU, the loss in a compiled graph is our operation."""
    monkeypatch.setitem(dispatch._IN_GRAPHS, "cpu", dispatch._IN_GRAPHS["cuda"])
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_our_loss_in_a_graph(in_graphs, reduction, wanted):
    targets = _targets(70, 61)

    def ours(x, weight):
        return linear_cross_entropy(x, weight, targets, reduction=reduction)

    def theirs(x, weight):
        return F.cross_entropy(F.linear(x, weight), targets, reduction=reduction)

    inputs, found = (torch.randn(70, 24), torch.randn(61, 24)), []
    inputs = [t.requires_grad_(want) for t, want in zip(inputs, wanted, strict=True)]
    upstream = torch.randn(70) if reduction == "none" else torch.tensor(-0.7)
    for loss in (torch.compile(ours, backend="aot_eager", fullgraph=True), theirs):
        y = loss(*inputs)
        grads = torch.autograd.grad(y, [t for t in inputs if t.requires_grad], upstream)
        found.append(dict(enumerate((y, *grads))))
    assert_same(*found)


def test_a_compiled_training_step_with_our_loss(in_graphs):
    model, ids = pair(n_layers=1)[0], some_ids()
    right = torch.autograd.grad(readers_loss(model, ids, ids), list(model.parameters()))
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(ids, ids), list(model.parameters()))
    for ours, theirs in zip(found, right, strict=True):
        assert_same(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = compiled(ids, ids)
    assert narrow.dtype == torch.float32
    assert_same(narrow, model.loss(ids, ids), rtol=0.02)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_registered_operation(reduction):
    x, weight = torch.randn(7, 24, requires_grad=True), torch.randn(61, 24, requires_grad=True)
    targets = _targets(7, 61)
    for wanted in ((True, True), (False, True), (False, False)):
        arguments = (x, weight, targets, -100, reduction, *wanted)
        opcheck(torch.ops.fastgpt.linear_cross_entropy.default, arguments)
    dloss = torch.ones(7 if reduction == "none" else ())
    arguments = (dloss, x.detach(), weight.detach(), targets, -100, reduction, True, False)
    opcheck(torch.ops.fastgpt.linear_cross_entropy_backward.default, arguments)
