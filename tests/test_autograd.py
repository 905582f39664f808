"""Gradients in every way that PyTorch takes them, and every dtype, as on the reference."""

import copy
import functools

import pytest
import torch
from pairs import assert_same, assert_same_model, outputs_and_grads, pair, some_ids, weigh
from torch.utils.checkpoint import checkpoint

import fastgpt

pytestmark = [
    pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning"),
]


def grads_of(model, loss):
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_two_forwards_before_one_backward_and_an_inference_between():
    grads = []
    for model in pair():
        first = model(some_ids(seed=1))
        with torch.no_grad():
            model(some_ids(seed=2))
        second = model(some_ids(seed=3))
        with torch.inference_mode():
            model(some_ids(seed=4))
        grads.append(grads_of(model, first.square().mean() + second.cos().mean()))
    assert_same(*grads)


def test_gradients_add_up_and_a_graph_serves_twice():
    grads = []
    for model in pair():
        loss = model(some_ids()).square().mean()
        loss.backward(retain_graph=True)
        grads.append(grads_of(model, loss))
    assert_same(*grads)


@pytest.mark.parametrize(
    "part",
    [
        "",
        "trf_blocks.0",
        "trf_blocks.0.att",
        "trf_blocks.0.ff",
        "final_norm",
        "trf_blocks.0.ff.layers.1",
    ],
)
def test_an_expanded_upstream_gradient(part):
    """As sum() sends it: strides of zero."""
    x = torch.randn(2, 9, 48) if part else some_ids()
    grads = []
    for model in pair():
        module = model.get_submodule(part)
        leaf = x.clone().requires_grad_(x.is_floating_point())
        module(leaf).sum().backward()
        grads.append([leaf.grad, *(p.grad for p in module.parameters())])
    assert_same(*([g for g in of if g is not None] for of in grads), atol=1e-4)


def test_only_the_input_learns():
    results = []
    for model in pair():
        block = model.trf_blocks[0].requires_grad_(False)
        results.append(outputs_and_grads(block, torch.ones(1, 5, 48).cumsum(-1)))
    assert list(results[0]) == ["output", "x"]
    assert_same(*results)


PARAMETERS = [name for name, _ in pair(n_layers=1)[1].named_parameters()]


@pytest.mark.parametrize("name", PARAMETERS)
def test_only_a_tensor_in_place_of_a_parameter_learns(name):
    """As under a hypernetwork: what stands in the module is no parameter, and leads elsewhere."""
    results = []
    for model in pair(n_layers=1):
        model.requires_grad_(False)
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        z = module._parameters[leaf].clone().requires_grad_()
        delattr(module, leaf)
        setattr(module, leaf, z.sin())
        with torch.no_grad():
            logits = model(some_ids())
        results.append([logits, *torch.autograd.grad(weigh(model(some_ids())), z)])
    assert_same(*results, atol=1e-4)


@pytest.mark.parametrize("name", ["trf_blocks.0.norm2.scale", "out_head.weight"])
@pytest.mark.parametrize("own_loss", [False, True])
def test_a_weight_changed_between_forward_and_backward_is_an_error(name, own_loss):
    for model in pair()[: 1 if own_loss else 2]:
        loss = model.loss(some_ids(), some_ids()) if own_loss else model(some_ids()).sum()
        with torch.no_grad():
            model.get_parameter(name).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


BIASES = [
    "trf_blocks.0.att.W_key.bias",
    "trf_blocks.0.att.out_proj.bias",
    "trf_blocks.1.ff.layers.0.bias",
    "trf_blocks.1.ff.layers.2.bias",
    "final_norm.shift",
]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_changed_between_forward_and_backward_is_none_of_its_business(name, hooked):
    if hooked and name == "trf_blocks.1.ff.layers.0.bias":
        pytest.skip("GELU alone keeps its input and the bias rather than their sum")
    grads = []
    for model in pair():
        if hooked:  # so that no block runs as one operation
            for block in model.trf_blocks:
                block.att.register_forward_hook(lambda *_: None)
        loss = weigh(model(some_ids()))
        with torch.no_grad():
            model.get_parameter(name).add_(2)
        grads.append(grads_of(model, loss))
    assert_same(*grads)


def test_a_second_derivative_refuses_a_bias_changed_after_the_forward_pass():
    model = pair()[0]
    bias = model.trf_blocks[0].ff.layers[0].bias
    loss = weigh(model(some_ids()))
    with torch.no_grad():
        bias.add_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, bias, create_graph=True)


def test_a_frozen_weight_changed_before_backward_where_no_gradient_needs_it():
    """The input of the head learns nothing, so its weight's values are not needed."""
    grads = []
    for model in pair():
        model.requires_grad_(False)
        model.out_head.weight.requires_grad_(True)
        loss = weigh(model(some_ids()))
        with torch.no_grad():
            model.out_head.weight.mul_(2)
        loss.backward()
        grads.append({"head": model.out_head.weight.grad})
    assert_same(*grads)


def test_activations_kept_elsewhere():
    grads = []
    for model in pair():
        with torch.autograd.graph.save_on_cpu():
            loss = model(some_ids()).square().mean()
        grads.append(grads_of(model, loss))
    assert_same(*grads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    results = []
    for i, model in enumerate(pair()):
        for block in model.trf_blocks if i == 0 else []:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)
        results.append(grads_of(model, model(some_ids()).square().mean()))
    assert_same(*results)


def test_double_backward():
    """The gradient of the gradient's norm."""
    if not fastgpt.backends()["cpu"].available:
        pytest.skip("PyTorch's own attention has no second derivative")
    seconds = []
    for model in pair(n_layers=1):
        params = dict(model.named_parameters())
        loss = model(some_ids()).square().mean()
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        norm = sum(g.square().sum() for g in grads)
        seconds.append(
            dict(zip(params, torch.autograd.grad(norm, list(params.values())), strict=True))
        )
    assert_same(*seconds, rtol=1e-3, atol=1e-3)


def tied(model):
    model.out_head.weight = model.tok_emb.weight


def tied_inside_a_block(model):
    att = model.trf_blocks[0].att
    att.W_value.weight = att.W_query.weight


def the_same_block_twice(model):
    model.trf_blocks[1] = model.trf_blocks[0]


def test_double_backward_in_bfloat16():
    seconds = []
    for model in (pair(n_layers=1)[0].to(dtype) for dtype in (torch.bfloat16, torch.float32)):
        x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
        x = x.to(model.final_norm.scale.dtype).requires_grad_()
        (dx,) = torch.autograd.grad(weigh(model.final_norm(x)), x, create_graph=True)
        seconds.append(torch.autograd.grad(dx.square().sum(), x)[0].float())
    torch.testing.assert_close(*seconds, rtol=0.05, atol=0.05 * seconds[1].abs().max().item())


@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("tie", [tied, tied_inside_a_block, the_same_block_twice])
def test_double_backward_of_parameters_in_two_places(tie, own_loss):
    results = []
    for model in pair():
        tie(model)
        params, ids = list(model.parameters()), some_ids()
        if own_loss and isinstance(model, fastgpt.GPTModel):
            loss = model.loss(ids, ids)
        else:
            loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        grads = torch.autograd.grad(loss, params, create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), params)])
    assert_same(*results, atol=1e-4)


def tangents(model):
    torch.manual_seed(4)
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


def call(model, params, ids):
    return torch.func.functional_call(model, params, (ids,))


def test_forward_mode():
    results = []
    for model in pair():
        params, directions = dict(model.named_parameters()), tangents(model)
        with torch.autograd.forward_ad.dual_level():
            duals = {
                name: torch.autograd.forward_ad.make_dual(p, directions[name])
                for name, p in params.items()
            }
            y = call(model, duals, some_ids())
            results.append(torch.autograd.forward_ad.unpack_dual(y))
    assert_same(results[0].primal, results[1].primal)
    assert_same(results[0].tangent, results[1].tangent, atol=1e-3)


# torch.func


@pytest.mark.parametrize("which", ["parameters", "state_dict"])
def test_functional_call(which):
    ours, book = pair()
    other, _ = pair()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.2)
    weights = dict(other.named_parameters()) if which == "parameters" else other.state_dict()
    with torch.no_grad():
        results = [call(model, weights, some_ids()) for model in (ours, book)]
    assert_same(*results)
    assert_same_model(ours, book)


def test_grad():
    results = []
    for model in pair():
        params = {name: p.detach() for name, p in model.named_parameters()}
        f = functools.partial(lambda m, p: call(m, p, some_ids()).square().mean(), model)
        results.append(torch.func.grad(f)(params))
    assert_same(*results)


def test_jvp():
    results = []
    for model in pair():
        params = {name: p.detach() for name, p in model.named_parameters()}
        f = functools.partial(lambda m, p: call(m, p, some_ids()), model)
        results.append(torch.func.jvp(f, (params,), (tangents(model),)))
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1], atol=1e-3)


def test_gradients_per_sample():
    results = []
    for model in pair():
        params = {name: p.detach() for name, p in model.named_parameters()}

        def loss(p, ids, model=model):
            return call(model, p, ids[None]).square().mean()

        results.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(params, some_ids(4)))
    assert_same(*results)


def test_the_curvature_along_a_direction():
    """Forward mode over the gradient."""
    results = []
    for model in pair(n_layers=1):
        params = {name: p.detach() for name, p in model.named_parameters()}
        f = functools.partial(lambda m, p: call(m, p, some_ids()).square().mean(), model)
        results.append(torch.func.jvp(torch.func.grad(f), (params,), (tangents(model),))[1])
    assert_same(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("some", [".", "bias", "layers.0.bias", "norm2.scale"])
def test_an_ensemble(some):
    """vmap over stacked weights: all of them, or a few while the others are shared."""
    results = []
    for model in pair():
        params = {name: p.detach() for name, p in model.named_parameters()}
        dims = {name: 0 if some in name else None for name in params}
        stacked = {
            name: torch.stack([p, p * 1.1, p * 0.9]) if dims[name] == 0 else p
            for name, p in params.items()
        }
        f = functools.partial(call, model, ids=some_ids())
        results.append(torch.func.vmap(lambda p, f=f: f(p), (dims,))(stacked))
    assert results[1].shape == (3, 2, 9, 61)
    assert_same(*results)


# Dtypes


def test_float64():
    """To the eighth digit: there the reference's constant of the GELU is a float32."""
    assert_same_model(*(model.double() for model in pair()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    ours, book = (model.to(dtype) for model in pair())
    exact = outputs_and_grads(copy.deepcopy(book).double(), some_ids())
    mine, theirs = outputs_and_grads(ours, some_ids()), outputs_and_grads(book, some_ids())
    for name, right in exact.items():
        assert mine[name].dtype == dtype
        error, allowed = ((d[name].double() - right).norm() for d in (mine, theirs))
        tiny = 2 * torch.finfo(dtype).eps * max(right.norm(), 1)
        assert error <= 2 * allowed + tiny, name


def test_autocast():
    ours, book = pair()
    exact = outputs_and_grads(copy.deepcopy(book).double(), some_ids())
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = outputs_and_grads(ours, some_ids()), outputs_and_grads(book, some_ids())
    for name, right in exact.items():
        assert mine[name].dtype == theirs[name].dtype
        error, allowed = ((d[name].double() - right).norm() for d in (mine, theirs))
        assert error <= 2 * allowed + 1e-2 * max(right.norm(), 1), name


def test_a_part_in_another_dtype():
    """The head in float64 behind a float32 body, the norms in float32 inside a bfloat16 body."""
    ours, book = pair()
    for model in (ours, book):
        model.out_head.double()
        model.final_norm.register_forward_hook(lambda _, x, y: y.double())
    assert_same_model(ours, book)


def test_built_under_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        models = pair()
        assert models[0].tok_emb.weight.dtype == torch.float64
        assert_same(
            *(outputs_and_grads(model, some_ids()) for model in models), rtol=1e-9, atol=1e-9
        )
    finally:
        torch.set_default_dtype(torch.float32)
