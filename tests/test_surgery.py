"""What readers do to the book's model works on ours, and gives what it gives on the reference."""

import copy

import pytest
import torch
from pairs import (
    CONFIG,
    assert_same,
    assert_same_model,
    outputs_and_grads,
    pair,
    some_ids,
    wrap_weight,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastgpt
from fastgpt import reference

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")

LINEARS = [
    *(f"trf_blocks.0.att.{name}" for name in ("W_query", "W_key", "W_value", "out_proj")),
    "trf_blocks.0.ff.layers.0",
    "trf_blocks.0.ff.layers.2",
    "out_head",
]
NORMS = ["trf_blocks.0.norm1", "trf_blocks.0.norm2", "trf_blocks.1.norm1", "final_norm"]


class LoRA(nn.Module):
    """The book's appendix E: no weight of its own, the frozen layer inside."""

    def __init__(self, linear, rank=4):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(linear.in_features, rank) / 4)
        self.B = nn.Parameter(torch.randn(rank, linear.out_features) / 4)

    def forward(self, x):
        return self.linear(x) + x @ self.A @ self.B


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu() + 0.5


class Scaled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 1.5 * weight.tanh()


def replace(model, name, change):
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, change(model.get_submodule(name)))


def subclassed(linear):
    other = Noisy(linear.in_features, linear.out_features, linear.bias is not None)
    other.load_state_dict(linear.state_dict())
    return other


def column_major(linear):
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    return linear


def without_bias(linear):
    linear.bias = None
    return linear


def plain_tensors(module):
    """As hypernetworks and meta-learning have it: what was a parameter is any tensor."""
    for name, p in list(module.named_parameters()):
        delattr(module, name)
        setattr(module, name, p.detach() * 1.5)
    return module


def frozen(module):
    return module.requires_grad_(False)


def patched(module):
    original = module.forward
    module.forward = lambda x: original(x * 0.5) + 1
    return module


def parametrized(module):
    name = "weight" if hasattr(module, "weight") else "scale"
    parametrize.register_parametrization(module, name, Scaled())
    return module


def pruned(module):
    name = "weight" if hasattr(module, "weight") else "scale"
    return prune.l1_unstructured(module, name, amount=0.5)


EVERY_LINEAR = {
    "lora": LoRA,
    "subclassed": subclassed,
    "column_major": column_major,
    "plain_tensors": plain_tensors,
    "frozen": frozen,
    "patched": patched,
    "parametrized": parametrized,
    "weight_norm": parametrizations.weight_norm,
    "pruned": pruned,
    "no_bias": without_bias,
    "wrapped_weight": wrap_weight,
    "identity_behind": lambda linear: nn.Sequential(linear, nn.Identity()),
}
EVERY_NORM = {
    "torchs": lambda norm: nn.LayerNorm(norm.scale.shape),
    "identity": lambda _: nn.Identity(),
    "plain_tensors": plain_tensors,
    "frozen": frozen,
    "patched": patched,
    "parametrized": parametrized,
    "pruned": pruned,
}
CHANGES = [(name, change) for name in LINEARS for change in EVERY_LINEAR.items()]
CHANGES += [(name, change) for name in NORMS for change in EVERY_NORM.items()]


@pytest.mark.parametrize(
    ("name", "change"), CHANGES, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_one_module_changed(name, change):
    models = pair()
    models[0](some_ids())
    for model in models:
        torch.manual_seed(5)
        replace(model, name, change[1])
    assert_same_model(*models)


SURGERIES = []


def surgery(f):
    SURGERIES.append(f)
    return f


@surgery
def lora_everywhere(model):
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    model.requires_grad_(False)
    for name in linears:
        replace(model, name, LoRA)


@surgery
def classifier(model):
    """The book's chapter 6: two classes, only the last block, the last norm and the head learn."""
    model.requires_grad_(False)
    model.out_head = nn.Linear(48, 2)
    model.trf_blocks[-1].requires_grad_(True)
    model.final_norm.requires_grad_(True)


@surgery
def tied(model):
    model.out_head.weight = model.tok_emb.weight


@surgery
def larger_vocabulary(model):
    for name in ("tok_emb", "out_head"):
        old = getattr(model, name).weight.detach()
        weight = nn.Parameter(torch.cat([old, torch.randn(9, 48)]))
        setattr(
            model, name, nn.Embedding(70, 48) if name == "tok_emb" else nn.Linear(48, 70, False)
        )
        getattr(model, name).weight = weight


@surgery
def packed(model):
    """As from Hugging Face: query, key and value are views of one transposed tensor."""
    for block in model.trf_blocks:
        weight, bias = torch.randn(48, 144) / 7, torch.randn(144) / 7
        for i, name in enumerate(("W_query", "W_key", "W_value")):
            part = slice(48 * i, 48 * i + 48)
            getattr(block.att, name).weight = nn.Parameter(weight[:, part].T)
            getattr(block.att, name).bias = nn.Parameter(bias[part])


@surgery
def slices_of_larger_weights(model):
    for module in model.modules():
        if hasattr(module, "weight"):
            rows, cols = module.weight.shape
            larger = torch.randn(rows + 2, cols + 5) / 7
            module.weight = nn.Parameter(larger[1:-1, 3:-2])


@surgery
def column_major_embeddings(model):
    column_major(model.tok_emb)
    column_major(model.pos_emb)


@surgery
def strided_vectors(model):
    """Biases, scales and shifts that step over memory."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.dim() == 1:
                setattr(
                    module, name, nn.Parameter(torch.stack([p.detach(), p.detach() + 9], 1)[:, 0])
                )


@surgery
def query_frozen(model):
    for block in model.trf_blocks:
        block.att.W_query.requires_grad_(False)


@surgery
def key_and_value_frozen(model):
    for block in model.trf_blocks:
        block.att.W_key.requires_grad_(False)
        block.att.W_value.requires_grad_(False)


@surgery
def only_biases(model):
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))


@surgery
def only_one_scale(model):
    model.requires_grad_(False)
    model.trf_blocks[0].norm2.scale.requires_grad_(True)


@surgery
def only_one_bias(model):
    model.requires_grad_(False)
    model.trf_blocks[0].ff.layers[0].bias.requires_grad_(True)


@surgery
def fewer_blocks(model):
    model.trf_blocks = model.trf_blocks[1:]


@surgery
def one_more_block(model):
    model.trf_blocks.append(copy.deepcopy(model.trf_blocks[0]))


@surgery
def shared_block(model):
    model.trf_blocks[1] = model.trf_blocks[0]


@surgery
def no_block(model):
    model.trf_blocks = nn.Identity()


@surgery
def block_of_another_kind(model):
    model.trf_blocks.insert(1, nn.Sequential(nn.Linear(48, 48), nn.Tanh()))


@surgery
def blocks_of_the_reference(model):
    block = reference.TransformerBlock(CONFIG)
    block.load_state_dict(model.trf_blocks[0].state_dict())
    model.trf_blocks[0] = block


@surgery
def norm_of_the_reference(model):
    model.trf_blocks[1].norm2 = reference.LayerNorm(48)


@surgery
def other_activations(model):
    model.trf_blocks[0].ff.layers[1] = nn.GELU(approximate="tanh")
    model.trf_blocks[1].ff.layers[1] = nn.SiLU()


@surgery
def longer_feed_forward(model):
    model.trf_blocks[0].ff.layers.append(nn.Linear(48, 48))
    model.trf_blocks[1].ff.layers.insert(1, nn.Linear(192, 192))


@surgery
def narrower_feed_forward(model):
    layers = model.trf_blocks[1].ff.layers
    layers[0], layers[2] = nn.Linear(48, 20), nn.Linear(20, 48)


@surgery
def other_attention(model):
    model.trf_blocks[0].att = nn.Sequential(nn.Linear(48, 48), nn.Tanh())


@surgery
def wider_attention(model):
    model.trf_blocks[0].att = type(model.trf_blocks[0].att)(48, 96, 32, 0.0, 4)
    model.trf_blocks[0].att.out_proj = nn.Linear(96, 48)


@surgery
def more_heads(model):
    for block in model.trf_blocks[1:]:
        block.att.num_heads, block.att.head_dim = 6, 8


@surgery
def other_feed_forward(model):
    model.trf_blocks[0].ff = nn.Sequential(nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 48))


@surgery
def feed_forward_of_the_first_token(model):
    class First(nn.Module):
        def forward(self, x):
            return x[:, :1].sin()  # broadcast over the tokens by the shortcut

    for block in model.trf_blocks:
        block.ff = First()


@surgery
def layers_in_a_subclass(model):
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    for block in model.trf_blocks:
        block.ff.layers = Residual(*block.ff.layers)


@surgery
def no_dropouts(model):
    for name in [n for n, m in model.named_modules() if isinstance(m, nn.Dropout)]:
        replace(model, name, lambda _: nn.Identity())


@surgery
def other_dropouts(model):
    for name in [n for n, m in model.named_modules() if isinstance(m, nn.Dropout)]:
        replace(model, name, lambda _: nn.Hardtanh(-0.2, 0.2))


@surgery
def dropout_switched_on(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0  # for less the masks are of our own making: test_dropout.py


@surgery
def other_eps(model):
    model.trf_blocks[0].norm2.eps = model.trf_blocks[1].norm1.eps = 0.5


@surgery
def other_positions(model):
    class Sine(nn.Module):
        def forward(self, positions):
            return torch.sin(positions[:, None] / torch.arange(1, 49))

    model.pos_emb = Sine()


class Only(nn.Module):
    """Passes on some of the tokens or rows."""

    def __init__(self, *index):
        super().__init__()
        self.index = index

    def forward(self, x):
        return x[self.index]


@surgery
def the_last_token_alone(model):
    model.trf_blocks.insert(1, Only(slice(None), slice(-1, None)))


@surgery
def the_first_row_alone(model):
    model.drop_emb = Only(slice(0, 1))


@surgery
def a_soft_prompt(model):
    class Prompt(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompt = nn.Parameter(torch.randn(5, 48))

        def forward(self, x):
            return torch.cat([self.prompt.expand(len(x), 5, 48), x], dim=1)

    model.drop_emb = Prompt()


@surgery
def a_wider_half(model):
    block = type(model.trf_blocks[0])({**CONFIG, "emb_dim": 96})
    model.trf_blocks = nn.Sequential(model.trf_blocks[0], nn.Linear(48, 96), block)
    model.final_norm = type(model.final_norm)(96)
    model.out_head = nn.Linear(96, 61)


@surgery
def clipped_embeddings(model):
    model.tok_emb.max_norm = 1.0


@surgery
def padding_index(model):
    model.tok_emb.padding_idx = 3
    model.tok_emb.scale_grad_by_freq = True


@surgery
def patched_blocks(model):
    for block in model.trf_blocks:
        patched(block)


@surgery
def patched_everywhere(model):
    for name, module in model.named_modules():
        if name and "emb" not in name and not isinstance(module, nn.Sequential):
            patched(module)


@pytest.mark.parametrize("change", SURGERIES, ids=lambda f: f.__name__)
def test_surgery(change):
    models, results = pair(), []
    models[0](some_ids())
    for model in models:
        torch.manual_seed(5)
        change(model)
        torch.manual_seed(6)  # for dropout
        results.append(outputs_and_grads(model, some_ids()))
        with torch.no_grad():
            results[-1]["no_grad"] = model(some_ids())
    assert_same(*results)


@pytest.mark.parametrize(
    "name", ["LayerNorm", "GELU", "FeedForward", "MultiHeadAttention", "TransformerBlock", "Linear"]
)
def test_a_class_patched(monkeypatch, name):
    models = pair()
    models[0](some_ids())
    for source in [nn] if name == "Linear" else [fastgpt, reference]:
        cls = getattr(source, name)
        forward = cls.forward
        monkeypatch.setattr(cls, "forward", lambda self, x, forward=forward: forward(self, x) * 0.7)
    _, plain = pair()
    assert_same_model(*models)
    monkeypatch.undo()
    assert_same_model(models[0], plain)


@pytest.mark.parametrize("cls", [nn.Module, nn.Linear])
def test_the_call_of_a_class_patched(monkeypatch, cls):
    models, call = pair(), nn.Module.__call__
    monkeypatch.setattr(cls, "__call__", lambda self, *args: call(self, *args) * 0.9)
    assert_same_model(*models)


def test_a_fresh_attribute_is_not_a_module_of_the_model():
    ours, book = pair()
    for model in (ours, book):
        model.trf_blocks[0].att.note = "kept"
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in book.named_modules()]
    assert_same_model(ours, book)


def test_the_shortcuts_dropout_has_the_packages_name_too():
    block = fastgpt.TransformerBlock(CONFIG)
    assert block.drop_resid is block.drop_shortcut
    block.drop_resid = nn.Identity()
    assert isinstance(block.drop_shortcut, nn.Identity)
    assert "drop_resid" not in dict(block.named_modules())


@pytest.mark.parametrize("autocast", [False, True])
def test_every_weight_wrapped(autocast):
    """Also where autocast would narrow it."""
    ours, book = pair()
    for model in (ours, book):
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                wrap_weight(module)
    rounding = {"rtol": 0.02, "atol": 0.02} if autocast else {}
    with torch.autocast("cpu", enabled=autocast):
        assert_same_model(ours, book, **rounding)
