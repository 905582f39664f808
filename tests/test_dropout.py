"""The fused dropouts: their masks bit for bit, in forward and in backward, and what they draw."""

import copy

import philox
import pytest
import torch
from pairs import CONFIG, assert_same, assert_same_model, outputs_and_grads, pair, some_ids, weigh
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastgpt
from fastgpt import ops
from fastgpt.ops.dropout_seed import draw_seed, draw_seeds

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
P = 0.3
CPU = torch.device("cpu")


def seeds_after(manual_seed, n=1):
    torch.manual_seed(manual_seed)
    seeds = draw_seeds(CPU, *[P] * n)
    torch.manual_seed(manual_seed)
    return seeds


def test_numpy_philox_gives_the_published_numbers():
    """The known answers of the authors' own test file."""
    ones = 0xFFFFFFFF
    assert [f"{n:08x}" for n in philox.philox([0] * 4, (0, 0))] == [
        "6627e8d5",
        "e169c58d",
        "bc57ac4c",
        "9b00dbd8",
    ]
    assert [f"{n:08x}" for n in philox.philox([ones] * 4, (ones, ones))] == [
        "408f276d",
        "41c83b0e",
        "a20bc7c6",
        "6d5451fd",
    ]


@pytest.mark.parametrize("cols", [1, 16, 48, 64, 65, 200])
def test_the_mask_of_a_branch(fused, cols):
    x, branch = torch.randn(5, cols), torch.randn(5, cols, requires_grad=True)
    mask = philox.keep(*seeds_after(3), (5, cols), P).float()
    _, total = ops.add_layer_norm(x, branch, torch.ones(cols), torch.zeros(cols), dropout_p=P)
    torch.testing.assert_close(total, x + mask * branch)
    assert torch.equal(total == x, mask == 0)
    (grad,) = torch.autograd.grad(total, branch, torch.ones_like(total))
    assert torch.equal(grad, mask)


def test_the_mask_of_the_embeddings(fused):
    tok, pos = torch.randn(7, 80, requires_grad=True), torch.randn(9, 80, requires_grad=True)
    idx = torch.randint(0, 7, (2, 5))
    mask = philox.keep(*seeds_after(3), (2, 5, 80), P).float()
    x = ops.embedding(idx, tok, pos, past=2, dropout_p=P)
    theirs = mask * (tok[idx] + pos[2:7])
    torch.testing.assert_close(x, theirs)
    grads = (torch.autograd.grad(weigh(y), (tok, pos)) for y in (x, theirs))
    assert_same(*grads)


def attention_with(mask, q, k, v):
    T, S = q.shape[2], k.shape[2]
    scores = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(
        torch.ones(T, S).triu(S - T + 1) > 0, -torch.inf
    )
    return (scores.softmax(-1) * mask.to(q.dtype)) @ v


@pytest.mark.parametrize(("T", "S", "D"), [(1, 1, 16), (7, 9, 24), (50, 130, 64), (129, 129, 16)])
def test_the_mask_of_the_attention(fused, T, S, D):
    q, k, v = (torch.randn(2, 3, n, D, requires_grad=True) for n in (T, S, S))
    mask = philox.keep(*seeds_after(5), (2, 3, T, S), P)
    ours, theirs = ops.causal_attention(q, k, v, dropout_p=P), attention_with(mask, q, k, v)
    assert_same(ours, theirs)
    assert_same(*(torch.autograd.grad(weigh(y), (q, k, v)) for y in (ours, theirs)))


def test_the_masks_of_a_block(fused):
    """Forward and every gradient, against the block taken apart with the same masks."""
    model = pair(drop_rate=P)[0]
    block, B, T, D, H = model.trf_blocks[0], 2, 9, CONFIG["emb_dim"], CONFIG["n_heads"]
    x = torch.randn(B, T, D, requires_grad=True)
    shapes = [(B, H, T, T), (B, T, D), (B, T, D)]
    masks = [philox.keep(s, shape, P) for s, shape in zip(seeds_after(8, 3), shapes, strict=True)]
    ours = block(x)
    att = block.att
    h = F.layer_norm(x, (D,), block.norm1.scale, block.norm1.shift)
    q, k, v = (
        linear(h).unflatten(-1, (H, -1)).transpose(1, 2)
        for linear in (att.W_query, att.W_key, att.W_value)
    )
    context = attention_with(masks[0], q, k, v)
    branch = att.out_proj(context.transpose(1, 2).flatten(2))
    m = x + masks[1].float() * branch
    h = F.layer_norm(m, (D,), block.norm2.scale, block.norm2.shift)
    up, _, down = block.ff.layers
    branch = down(F.gelu(up(h), approximate="tanh"))
    theirs = m + masks[2].float() * branch
    assert_same(ours, theirs)
    leaves = [x, *block.parameters()]
    assert_same(*(torch.autograd.grad(weigh(y), leaves) for y in (ours, theirs)))


def losses(model, n=3):
    """And the gradients, under one seed."""
    torch.manual_seed(9)
    found = []
    for _ in range(n):
        loss = model(some_ids()).square().mean()
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    return found


def test_repeats_under_a_seed_and_differs_between_calls(fused):
    model = pair(drop_rate=P)[0]
    first, second = losses(model), losses(model)
    for one, two in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert len({float(step[0]) for step in first}) == 3


def test_the_same_on_one_thread_as_on_several(fused):
    model = pair(drop_rate=P, emb_dim=96, vocab_size=700)[0]
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(losses(model, n=1)[0][0])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_keeps_the_mean(fused):
    """Over many masks the attention's output tends to what it is without dropout."""
    q, k, v = (torch.randn(1, 2, 24, 16) for _ in range(3))
    draws = torch.stack([ops.causal_attention(q, k, v, dropout_p=P) for _ in range(600)])
    error = (draws.mean(0) - ops.causal_attention(q, k, v)) / (draws.std(0) / 600**0.5 + 1e-6)
    assert error.square().mean() < 1.4  # of a standard normal: 1, give or take 0.05


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_drops_as_many_as_asked_for(fused, p):
    branch = torch.ones(300, 256)
    _, total = ops.add_layer_norm(
        0 * branch, branch, torch.ones(256), torch.zeros(256), dropout_p=p
    )
    spread = (p * (1 - p) / branch.numel()) ** 0.5
    assert abs((total == 0).float().mean().item() - p) < 5 * spread


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.0, False), (0.4, False)])
def test_no_dropout_draws_nothing(p, training):
    ours, _ = pair(drop_rate=p)
    before = torch.get_rng_state()
    ours.train(training)(some_ids()).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_everything_dropped(path):
    assert_same_model(*pair(drop_rate=1.0))


@pytest.mark.parametrize("where", ["everywhere", "drop_emb", "att.dropout", "drop_shortcut"])
def test_on_the_reference_backend_it_draws_what_the_book_draws(where):
    results = []
    for model in pair():
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and (where == "everywhere" or name.endswith(where)):
                module.p = 0.4
        torch.manual_seed(9)
        with fastgpt.use_backend("reference"):
            results.append(outputs_and_grads(model, some_ids()))
    assert_same(*results)


def test_one_part_in_training_mode(fused):
    model = pair(drop_rate=0.4)[0].eval()
    quiet = model(some_ids())
    assert torch.equal(model(some_ids()), quiet)
    model.trf_blocks[1].att.train()
    assert not torch.allclose(model(some_ids()), quiet, atol=1e-2)


def test_training_with_dropout_holds_no_mask():
    model = pair(drop_rate=0.3)[0].train()
    model(some_ids())
    assert all(block.att._buffers["mask"] is None for block in model.trf_blocks)


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_what_is_no_probability_is_refused(path, p):
    x = torch.randn(2, 2, 3, 8)
    for given in (x, x[:0]):
        with pytest.raises(ValueError, match="must be in"):
            ops.dropout(given, p)
    with pytest.raises(ValueError, match="must be in"):
        ops.causal_attention(x, x, x, dropout_p=p)
    with pytest.raises(ValueError, match="must be in"):
        ops.add_layer_norm(x, x, x[0, 0, 0], x[0, 0, 0], dropout_p=p)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_dropout_of_what_is_no_float_is_pytorchs(fused, dtype):
    for f in (ops.dropout, F.dropout):
        with pytest.raises(RuntimeError, match=r"cast|implemented"):
            f(torch.ones(3, 8).to(dtype), P)


def test_a_second_derivative_is_refused(fused):
    x = torch.randn(2, 2, 3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(
        ops.causal_attention(x, x, x).square().sum(), x, create_graph=True
    )
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(
            ops.causal_attention(x, x, x, dropout_p=P).square().sum(), x, create_graph=True
        )


def no_grad(model, ids):
    with torch.no_grad():
        return model(ids)


def inference_mode(model, ids):
    with torch.inference_mode():
        return model(ids).clone()


def hooked(*names):
    """With a hook on the modules of these names, so that they run as modules."""

    def run(model, ids):
        modules = [m for name, m in model.named_modules() if name.rpartition(".")[2] in names]
        assert modules
        handles = [m.register_forward_hook(lambda *args: None) for m in modules]
        try:
            return model(ids)
        finally:
            for handle in handles:
                handle.remove()

    return run


class OwnLinear(nn.Linear):
    """A subclass, which no fused code knows."""


def replaced(*names):
    """With another class of linear layer, which takes a block apart."""

    def run(model, ids):
        model = copy.deepcopy(model)
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in names:
                module.__class__ = OwnLinear
        return model(ids)

    return run


def cached(model, ids):
    with torch.no_grad():
        return model(ids, cache=fastgpt.KVCache(len(model.trf_blocks)))


def edited_mask(model, ids):
    """The mask is the causal one for every token there is, so the output is the same."""
    model = copy.deepcopy(model)
    for block in model.trf_blocks:
        block.att.mask[-1, -1] = 1
    return model(ids)


def checkpointed(reentrant):
    def run(model, ids):
        x = model.drop_emb(model.tok_emb(ids) + model.pos_emb(torch.arange(ids.shape[1])))
        for block in model.trf_blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.out_head(model.final_norm(x))

    return run


def wide(model, ids):
    """In float64, where no fused code runs."""
    return copy.deepcopy(model).double()(ids).float()


WAYS = {
    "no_grad": no_grad,
    "inference_mode": inference_mode,
    "a hook on the blocks": hooked("0", "1"),
    "a hook on the attention": hooked("att"),
    "a hook on the norms": hooked("norm1", "norm2", "final_norm"),
    "a hook on the dropouts": hooked("drop_emb", "dropout", "drop_shortcut"),
    "another query": replaced("W_query"),
    "another projection": replaced("out_proj"),
    "with a cache": cached,
    "an edited mask": edited_mask,
    "checkpointed": checkpointed(False),
    "checkpointed, reentrant": checkpointed(True),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_one_seed_gives_one_mask_whichever_path_computes(fused, way):
    assert_one_mask(way)


def test_one_seed_gives_one_mask_in_float64():
    assert_one_mask(wide)


@pytest.mark.parametrize("where", ["drop_emb", "dropout", "drop_shortcut"])
@pytest.mark.parametrize("change", ["another class", "in place"])
def test_a_dropout_that_draws_pytorchs_mask_does_so_on_every_path(fused, where, change):
    model, ids, outputs = pair(drop_rate=P)[0], some_ids(), []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == where:
            if change == "another class":
                module.__class__ = nn.Dropout
            else:
                module.inplace = True
    for run in (lambda model, ids: model(ids), no_grad, hooked(where)):
        torch.manual_seed(9)
        outputs.append([run(model, ids).detach(), torch.rand(())])
    assert_same(outputs[0], outputs[1])
    assert_same(outputs[0], outputs[2])


def assert_one_mask(way):
    model, ids, outputs = pair(drop_rate=P)[0], some_ids(), []
    for run in (lambda model, ids: model(ids), way):
        torch.manual_seed(9)
        outputs.append(run(model, ids))
        outputs[-1] = [outputs[-1].detach(), torch.rand(())]  # and the next draw is the same
    assert_same(*outputs)


def test_one_seed_gives_one_mask_under_autocast():
    model, ids, outputs = pair(drop_rate=P)[0], some_ids(), []
    for narrow in (False, True):
        torch.manual_seed(9)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            outputs.append(model(ids).float())
    off = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert off < 0.05  # bfloat16's rounding; other masks make it 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_gradients_of_its_loss(fused, reentrant):
    """A loss that is not linear: where the second forward pass drew other masks, the gradients
    would belong to another loss.
    """
    model, ids, found = pair(drop_rate=P)[0], some_ids(), []
    for run in (lambda model, ids: model(ids), checkpointed(reentrant)):
        torch.manual_seed(9)
        loss = F.cross_entropy(run(model, ids).flatten(0, 1), ids.flatten())
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad()
    assert_same(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_repeats_its_bits(fused, reentrant):
    block = pair(drop_rate=P)[0].trf_blocks[0]
    x = torch.randn(2, 9, CONFIG["emb_dim"], requires_grad=True)
    found = []
    for call in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(9)
        y = call(x)
        y.square().sum().backward()
        leaves = [x, *block.parameters()]
        found.append([y.detach(), *(leaf.grad.clone() for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_no_seed_is_drawn_into_a_cuda_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert draw_seed(CPU, 0.0) == 0
    with pytest.raises(RuntimeError, match="can't be captured in a CUDA graph"):
        draw_seed(CPU, P)


class _Generator:
    """What PyTorch keeps on the host for a GPU."""

    def __init__(self, seed, offset=0):
        self.seed, self.offset = seed, offset

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        assert offset % 4 == 0
        self.offset = offset


@pytest.fixture
def on_gpus(monkeypatch):
    """Sets the seeds and offsets of two GPUs."""

    def set_to(*states):
        generators = tuple(_Generator(*state) for state in states)
        monkeypatch.setattr(torch.cuda, "default_generators", generators)
        return generators

    return set_to


def test_seeds_on_a_gpu_are_the_published_numbers(on_gpus):
    """The first three that SplitMix64 gives for the seed 1234567, without their lowest bit."""
    on_gpus((0,), (1234567,))
    published = 6457827717110365317, 3203168211198807973, 9817491932198370423
    assert draw_seeds(torch.device("cuda", 1), P, P, P) == tuple(n >> 1 for n in published)


def test_seeds_on_a_gpu_come_from_its_generator_alone(on_gpus):
    gpu, other = torch.device("cuda", 0), torch.device("cuda", 1)
    generators, cpus = on_gpus((3,), (3,)), torch.get_rng_state()
    seeds = [draw_seed(gpu, P), *draw_seeds(gpu, 0.0, P, P)]
    assert [g.offset for g in generators] == [12, 0]
    assert torch.equal(torch.get_rng_state(), cpus)
    assert seeds[1] == 0
    assert len(set(seeds)) == 4
    assert draw_seed(other, P) == seeds[0]
    on_gpus((3, 4))  # as torch.utils.checkpoint puts it back
    assert [*draw_seeds(gpu, P, P)] == seeds[2:]
