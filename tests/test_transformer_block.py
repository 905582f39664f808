"""The block of a training step as one operation: every gradient against float64; when it runs."""

import copy

import pytest
import torch
from helpers import assert_as_exact, assert_small_rms
from pairs import CONFIG, assert_same, outputs_and_grads, pair, shake

import fastgpt
from fastgpt import ops, reference
from fastgpt.cpu.records import Linear


def blocks(emb_dim, n_heads, **changes):
    cfg = {**CONFIG, "emb_dim": emb_dim, "n_heads": n_heads, "context_length": 300, **changes}
    torch.manual_seed(1)
    ours, book = shake(fastgpt.TransformerBlock(cfg)), reference.TransformerBlock(cfg)
    book.load_state_dict(ours.state_dict())
    return ours, book


def is_one_operation(y):
    return "TransformerBlock" in type(y.grad_fn).__name__


@pytest.mark.parametrize(
    ("B", "T", "emb_dim", "n_heads", "bias"),
    [
        (1, 1, 16, 1, True),
        (2, 9, 48, 3, False),
        (2, 65, 64, 4, True),
        (1, 129, 96, 4, True),
        (3, 40, 80, 1, False),
        (1, 260, 64, 4, True),
    ],
)
def test_output_and_every_gradient(fused, B, T, emb_dim, n_heads, bias):
    ours, book = blocks(emb_dim, n_heads, qkv_bias=bias)
    x = torch.randn(B, T, emb_dim)
    exact = outputs_and_grads(copy.deepcopy(book).double(), x.double())
    mine, theirs = outputs_and_grads(ours, x), outputs_and_grads(book, x)
    assert is_one_operation(ours(x))
    for name, right in exact.items():
        # The key's bias cancels in the softmax: its gradient is nothing but rounding.
        if "W_key.bias" not in name:
            assert_as_exact(mine[name], theirs[name], right, name)
            if right.norm() > 0 and name != "output":
                assert_small_rms(mine[name], theirs[name], right, name)


PARAMETERS = [name for name, _ in blocks(48, 3)[0].named_parameters()]


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("alone", [True, False])
def test_any_parameter_frozen_or_alone(name, alone):
    results = []
    for block in blocks(48, 3):
        for other, p in block.named_parameters():
            p.requires_grad_((other == name) == alone)
        x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(2))
        (block(x) * torch.arange(48)).sum().backward()
        results.append({n: p.grad for n, p in block.named_parameters()})
    assert (results[0][name] is None) != alone
    assert_same(*results, atol=2e-3, rtol=1e-3)


def test_only_the_input_learns(fused):
    results = []
    for block in blocks(48, 3):
        block.requires_grad_(False)
        x = torch.ones(1, 5, 48).cumsum(-1).requires_grad_()
        results.append(torch.autograd.grad(block(x).sin().sum(), x))
    assert_same(*results)


def test_any_number_of_threads_gives_the_same_bits(fused):
    """Where the heads are enough for the threads; else a head is cut into shares."""
    block, x = blocks(96, 12)[0], torch.randn(2, 150, 96)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(outputs_and_grads(block, x))
    finally:
        torch.set_num_threads(before)
    for name, first in found[0].items():
        assert all(torch.equal(first, other[name]) for other in found[1:]), name


def test_a_head_shared_by_several_threads(fused):
    """Fewer heads than threads: gradients of the queries are added up from shares, in order."""
    ours, book = blocks(32, 1)
    x, before = torch.randn(1, 290, 32), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        mine = [outputs_and_grads(ours, x) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert_same(mine[0], outputs_and_grads(book, x), rtol=1e-3, atol=1e-3)
    for name, first in mine[0].items():
        assert all(torch.equal(first, other[name]) for other in mine[1:]), name


def test_column_major_weights():
    """As the book's weight loader leaves them; gradients lie as the weights do."""
    ours, book = blocks(48, 3)
    for block in (ours, book):
        for p in block.parameters():
            if p.dim() == 2:
                p.data = p.data.t().contiguous().t()
    x = torch.randn(2, 9, 48)
    assert is_one_operation(ours(x))
    assert_same(outputs_and_grads(ours, x), outputs_and_grads(book, x))
    ours(x).sum().backward()
    weight = ours.ff.layers[0].weight
    assert weight.grad.stride() == weight.stride()


def test_a_wider_middle():
    ours, book = blocks(32, 2)
    for block in (ours, book):
        torch.manual_seed(3)
        block.ff.layers[0] = torch.nn.Linear(32, 200)
        block.ff.layers[2] = torch.nn.Linear(200, 32, bias=False)
    x = torch.randn(2, 9, 32)
    assert is_one_operation(ours(x))
    assert_same(outputs_and_grads(ours, x), outputs_and_grads(book, x))


def test_what_changed_runs_by_itself():
    """The operations around a listened-to or replaced piece stay fused."""
    block, x = blocks(48, 3)[0], torch.randn(1, 4, 48)
    assert is_one_operation(block(x))
    seen = []
    handle = block.ff.register_forward_hook(lambda *a: seen.append(1))
    assert not is_one_operation(block(x))
    assert seen == [1]
    handle.remove()
    assert is_one_operation(block(x))
    block.att.out_proj = torch.nn.Sequential(block.att.out_proj)
    assert not is_one_operation(block(x))


def test_what_it_does_not_take():
    block = blocks(48, 3)[0]
    parameters, width, heads, *_ = block.record()
    for x in (torch.randn(4, 48), torch.randn(0, 4, 48), torch.randn(1, 4, 48).double()):
        assert ops.transformer_block(x, parameters, heads) is None
    with torch.autocast("cpu", torch.float16):
        assert ops.transformer_block(torch.randn(1, 4, 48), parameters, heads) is None
    assert ops.transformer_block(torch.randn(1, 4, 48).bfloat16(), parameters, heads) is None
    strided = parameters._replace(up=Linear(torch.randn(192, 96)[:, ::2], None))
    assert ops.transformer_block(torch.randn(1, 4, width), strided, heads) is None


@pytest.mark.parametrize("heads", [0, -1, 5])
def test_heads_that_do_not_divide_the_width(heads):
    parameters = blocks(48, 3)[0].record().parameters
    with pytest.raises(ValueError, match="must be a multiple of n_heads"):
        ops.transformer_block(torch.randn(1, 4, 48), parameters, heads)


def test_too_many_tokens():
    block = blocks(48, 3)[0]
    with pytest.raises(ValueError, match="301 tokens are more than the context length 300"):
        block(torch.randn(1, 301, 48))


def test_gradients_of_the_whole_model_twice_and_no_memory_shared():
    """What backward hands out is not what the next call writes."""
    model = pair()[0]
    ids = torch.randint(0, 61, (2, 9))
    model(ids).square().mean().backward()
    first = {n: p.grad for n, p in model.named_parameters()}
    kept = {n: g.clone() for n, g in first.items()}
    model.zero_grad()
    model(ids.flip(0)).sin().mean().backward()
    assert all(torch.equal(first[n], kept[n]) for n in first)
