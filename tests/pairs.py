"""What the model's test files share: small configs, the same weights in both models."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgpt
from fastgpt import reference

CONFIG = {
    "vocab_size": 61,
    "context_length": 32,
    "emb_dim": 48,
    "n_heads": 3,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": True,
}


def shake(module):
    """Moves a module off its initial values, which hide much (scales of 1, flat attention)."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "norm" in name or name in ("scale", "shift"):
                p.add_(0.3 * torch.randn_like(p))
            if "W_query" in name or "W_key" in name:
                p.mul_(3)
    return module


def pair(cfg=CONFIG, **changes):
    """(ours, reference): models with the same weights."""
    cfg = {**cfg, **changes}
    torch.manual_seed(123)
    ours, book = shake(fastgpt.GPTModel(cfg)), reference.GPTModel(cfg)
    book.load_state_dict(ours.state_dict())
    return ours, book


def some_ids(B=2, T=9, vocab=CONFIG["vocab_size"], seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (B, T), generator=generator)


def weigh(y):
    """A scalar in which every output has its own weight, so that every gradient differs."""
    generator = torch.Generator().manual_seed(11)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return (y * weights.to(y.dtype)).sum()


def outputs_and_grads(model, x):
    """The output, the gradient of a float x, and that of each parameter by name."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = model(x)
    inputs = [*params.values(), *([x] if x.requires_grad else [])]
    grads = torch.autograd.grad(weigh(y), inputs, allow_unused=True)
    return {"output": y.detach(), **dict(zip([*params, "x"], grads, strict=False))}


def assert_same(ours, book, rtol=1e-4, atol=2e-5):
    """Equal up to rounding in float32: for what is right or wrong, not more or less exact. Tensors,
    or dicts of them.

    A tensor may also be off by five millionths of its largest element: PyTorch's own gradients are
    off by three from float64 in these models, where a small one is the sum of large terms.
    """
    if isinstance(book, dict):
        assert ours.keys() == book.keys()
        for name, theirs in book.items():
            assert_same(ours[name], theirs, rtol, atol)
        return
    if isinstance(book, torch.Tensor) and book.is_floating_point():
        largest = book.detach().where(book.isfinite(), 0).abs().amax() if book.numel() else 0
        atol = max(atol, 5e-6 * float(largest))
    torch.testing.assert_close(ours, book, rtol=rtol, atol=atol)


def assert_same_model(ours, book, ids=None, **tolerance):
    """The same logits with gradients and without, and the same gradients by name."""
    ids = some_ids() if ids is None else ids
    with torch.no_grad():
        assert_same(ours(ids), book(ids), **tolerance)
    assert_same(outputs_and_grads(ours, ids), outputs_and_grads(book, ids), **tolerance)


class Wrapped(torch.Tensor):
    """A weight that looks up, multiplies and detaches, and nothing else, as quantised ones do."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.inner = weight.detach()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (F.linear, F.embedding):
            args = [t.inner if isinstance(t, cls) else t for t in args]
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.detach.default:
            raise NotImplementedError(str(func))
        return cls(args[0].inner)


def wrap_weight(module):
    module.weight = nn.Parameter(Wrapped(module.weight), requires_grad=False)
    return module


def hugging_face(**changes):
    """A random GPT2LMHeadModel of these sizes in eval mode, off its initial values."""
    transformers = pytest.importorskip("transformers", reason="transformers isn't installed")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 48, "n_positions": 32, "vocab_size": 61}
    ends = {"bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(5)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **ends, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def same_weights(one, other):
    """Whether both models hold the same numbers under the same names."""
    one, other = dict(one.named_parameters()), dict(other.named_parameters())
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def logits(model, ids=None):
    """What a model says of some ids; Hugging Face's is in an object."""
    result = model(some_ids() if ids is None else ids)
    return getattr(result, "logits", result)


def assert_same_logits(ours, theirs):
    with torch.no_grad():
        assert_same(logits(ours), logits(theirs))
