"""Parameters change behind the model's back; the next call sees it, whatever came before."""

import copy

import pytest
import torch
from pairs import assert_same, assert_same_model, pair, some_ids
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")


def fresh(p):
    generator = torch.Generator().manual_seed(p.numel())
    return torch.randn(p.shape, generator=generator) / 4


def data_copy(model, name, p):
    p.data.copy_(fresh(p))


def no_grad_copy(model, name, p):
    with torch.no_grad():
        p.copy_(fresh(p))


def numpy_write(model, name, p):
    p.data.numpy()[...] = fresh(p).numpy()  # leaves no trace in _version


def swap_data(model, name, p):
    p.data = fresh(p)


def set_storage(model, name, p):
    with torch.no_grad():
        p.set_(fresh(p))


def replace_parameter(model, name, p):
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(fresh(p)))


def swap_tensors(model, name, p):
    torch.utils.swap_tensors(p, nn.Parameter(fresh(p)))


def load(model, name, p):
    model.load_state_dict({**model.state_dict(), name: fresh(p)})


def load_assign(model, name, p):
    model.load_state_dict({**model.state_dict(), name: fresh(p)}, assign=True)


WAYS = [
    data_copy,
    no_grad_copy,
    numpy_write,
    swap_data,
    set_storage,
    replace_parameter,
    swap_tensors,
    load,
    load_assign,
]


def infer(model):
    """Calls of every kind that a cache might be filled by."""
    with torch.no_grad():
        model(some_ids())
    with torch.inference_mode():
        model(some_ids())
    model(some_ids()).sum().backward()
    model.zero_grad()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_each_parameter_changed(way):
    ours, book = pair(n_layers=1)
    for name in [name for name, _ in book.named_parameters()]:
        infer(ours)
        with torch.no_grad():
            before = book(some_ids())
            for model in (ours, book):
                way(model, name, model.get_parameter(name))
            if "W_key.bias" not in name:  # softmax doesn't see what is added to every key
                assert not torch.allclose(book(some_ids()), before, atol=1e-4), name
            assert_same(ours(some_ids()), book(some_ids()))
    assert_same_model(ours, book)


def test_every_parameter_changed_at_once(path):
    ours, book = pair()
    infer(ours)
    for model in (ours, book):
        for name, p in model.named_parameters():
            numpy_write(model, name, p)
    assert_same_model(ours, book)


@pytest.mark.parametrize(
    "options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str
)
def test_optimiser_steps_between_inference_calls(options):
    ours, book = pair()
    optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-2, **options) for m in (ours, book)]
    for step in range(3):
        ids = some_ids(seed=step)
        infer(ours)
        for model, optimiser in zip((ours, book), optimisers, strict=True):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
            optimiser.step()
        assert_same(ours(ids), book(ids), atol=1e-4)


def test_tied_weights_changed_in_place_through_either_name():
    ours, book = pair()
    for model in (ours, book):
        model.out_head.weight = model.tok_emb.weight
    for owner in ("tok_emb", "out_head"):
        infer(ours)
        for model in (ours, book):
            model.get_submodule(owner).weight.data.mul_(1.5).add_(0.1)
        assert_same_model(ours, book)


def test_an_ema_copied_back():
    ours, book = pair()
    average = [copy.deepcopy(p.detach()) for p in ours.parameters()]
    for model in (ours, book):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
    infer(ours)
    for model in (ours, book):
        for p, mean in zip(model.parameters(), average, strict=True):
            p.data.lerp_(mean, 0.75)
    assert_same_model(ours, book)


def test_freed_memory_at_the_same_address():
    ours, book = pair()
    weight = ours.trf_blocks[0].ff.layers[0].weight
    for seed in range(4):
        infer(ours)
        weight.data = torch.empty(0)  # frees it: the next block of this size comes from there
        weight.data = torch.randn(192, 48, generator=torch.Generator().manual_seed(seed)) / 4
        book.trf_blocks[0].ff.layers[0].weight.data.copy_(weight.data)
        assert_same(ours(some_ids()), book(some_ids()))


def test_a_mask_edited_after_calls():
    ours, book = pair()
    for model in (ours, book):
        _ = model.trf_blocks[1].att.mask
    infer(ours)
    for model in (ours, book):
        model.trf_blocks[1].att.mask.data[:4, :4] = 0
    assert_same_model(ours, book)
    infer(ours)
    for model in (ours, book):
        model.trf_blocks[1].att.mask.data.copy_(torch.ones(32, 32).triu(1))
    assert_same_model(ours, book)
