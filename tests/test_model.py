"""The model and its parts against the reference: values, gradients, training, bad input."""

import copy
import functools

import pytest
import torch
from pairs import CONFIG, assert_same_model, outputs_and_grads, pair, shake, some_ids
from torch.nn import functional as F

import fastgpt
from fastgpt import GPT_CONFIG_124M, reference

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")

# (batch, tokens) and what differs from CONFIG.
LENGTHS = [(2, T, {}) for T in (1, 2, 7, 64, 127, 128, 129)]
HEAD_DIMS = [(2, 66, {"n_heads": 2, "emb_dim": 2 * D}) for D in (16, 24, 64, 80)]
WIDTHS = [
    (2, 7, {"n_heads": 1, "emb_dim": 17}),
    (1, 40, {"n_heads": 12, "emb_dim": 768, "n_layers": 1}),
]
OTHERS = [
    (2, 20, {"vocab_size": 17}),
    (2, 20, {"vocab_size": 1}),
    (1, 4, {"vocab_size": 50257}),
    (3, 9, {"n_layers": 0}),
    (2, 9, {"qkv_bias": False}),
]
CASES = [*LENGTHS, *HEAD_DIMS, *WIDTHS, *OTHERS]


def label(case):
    B, T, changes = case
    return "-".join([f"B{B}", f"T{T}", *(f"{name}{value}" for name, value in changes.items())])


def assert_as_exact(ours, book, exact):
    """max|ours - exact| <= 2 max|reference - exact| + tiny, for an output and its gradients.

    Some gradients are nothing but cancellation (a bias on every key changes no output), so tiny
    goes by the largest of them all.
    """
    assert ours.keys() == book.keys() == exact.keys()
    tiny = 4 * torch.finfo(torch.float32).eps * max(t.abs().max().item() for t in exact.values())
    for name, right in exact.items():
        assert ours[name].shape == right.shape, name
        error, allowed = ((d[name].double() - right).abs().max().item() for d in (ours, book))
        assert error <= 2 * allowed + tiny, f"{name}: {error:.2e} off, the reference {allowed:.2e}"


@functools.cache
def case_of(number):
    """Our model, its ids, and the reference's results in float32 and float64."""
    B, T, changes = CASES[number]
    ours, book = pair(**{"context_length": 130, **changes})
    ids = some_ids(B, T, vocab=book.tok_emb.num_embeddings)
    right = outputs_and_grads(copy.deepcopy(book).double(), ids)
    return ours, ids, outputs_and_grads(book, ids), right


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(label, CASES))
def test_logits_and_gradients(path, number):
    ours, ids, book, exact = case_of(number)
    assert_as_exact(outputs_and_grads(ours, ids), book, exact)
    with torch.no_grad():
        logits = ours(ids)
    assert_as_exact(*({"output": t} for t in (logits, book["output"], exact["output"])))


@pytest.mark.parametrize(("B", "T"), [(0, 8), (2, 0), (0, 0)])
def test_nothing_to_do(path, B, T):
    ours, _ = pair()
    results = outputs_and_grads(ours, some_ids(B, T))
    assert results.pop("output").shape == (B, T, 61)
    assert all(grad is not None and not grad.any() for grad in results.values())


PARTS = {
    "LayerNorm": lambda m: m.LayerNorm(48),
    "GELU": lambda m: m.GELU(),
    "FeedForward": lambda m: m.FeedForward(CONFIG),
    "TransformerBlock": lambda m: m.TransformerBlock(CONFIG),
    "attention_to_wider": lambda m: m.MultiHeadAttention(48, 80, 32, 0.0, 5),
    "attention_to_narrower": lambda m: m.MultiHeadAttention(48, 24, 32, 0.0, 1, qkv_bias=True),
    "attention_by_name": lambda m: m.MultiHeadAttention(
        d_in=48, d_out=48, context_length=32, dropout=0.0, num_heads=2, qkv_bias=True
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_alone(path, part):
    torch.manual_seed(1)
    ours, book = shake(PARTS[part](fastgpt)), PARTS[part](reference)
    book.load_state_dict(ours.state_dict())
    x = torch.randn(2, 31, 48)
    kept = x.clone()
    exact = outputs_and_grads(copy.deepcopy(book).double(), x.double())
    assert_as_exact(outputs_and_grads(ours, x), outputs_and_grads(book, x), exact)
    with torch.no_grad():
        assert_as_exact({"": ours(x)}, {"": book(x)}, {"": exact["output"]})
    assert torch.equal(x, kept)


@torch.no_grad()
def test_a_block_as_wide_as_gpt2_xl(path):
    cfg = {**CONFIG, "emb_dim": 1600, "n_heads": 25}
    ours, book = fastgpt.TransformerBlock(cfg), reference.TransformerBlock(cfg)
    book.load_state_dict(ours.state_dict())
    x = torch.randn(1, 5, 1600)
    results = [{"": module(x)} for module in (ours, book)]
    assert_as_exact(*results, {"": book.double()(x.double())})


def losses(model, ids, steps=20):
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    torch.manual_seed(42)  # for dropout
    history = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten().long())
        loss.backward()
        optimiser.step()
        history.append(loss.detach())
    return torch.stack(history)


def test_twenty_steps_of_adamw(path):
    ours, book = pair()
    ids = some_ids(T=33)
    exact = losses(copy.deepcopy(book).double(), ids)
    assert exact[-1] < exact[0] - 0.3
    assert_as_exact({"": losses(ours, ids)}, {"": losses(book, ids)}, {"": exact})


def test_on_the_reference_backend_dropout_draws_the_same_numbers():
    ours, book = pair(drop_rate=0.2)
    ids = some_ids(T=33)
    with fastgpt.use_backend("reference"):
        torch.testing.assert_close(losses(ours, ids), losses(book, ids), rtol=1e-4, atol=0)


@pytest.mark.parametrize("T", [3, 70])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_not_a_number_and_infinity_go_through(path, bad, T, grad):
    ours, book = pair(context_length=70)
    ids = some_ids(T=T)
    ids[0, 1], ids[1] = 60, 5  # the only place of the bad embedding
    for model in (ours, book):
        model.tok_emb.weight.data[60, 7] = bad
    with torch.set_grad_enabled(grad):
        mine, right = ours(ids), book(ids)
    assert mine[0, 1:].isnan().all()
    assert right[0, 1:].isnan().all()
    torch.testing.assert_close(mine[1], right[1], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("position", [1, 63, 64, 100, 128])
def test_a_token_changes_no_earlier_bit(path, position):
    ours, _ = pair(context_length=129)
    ids = some_ids(T=129)
    other = ids.clone()
    other[:, position] = (other[:, position] + 1) % 61
    with torch.no_grad():
        before, after = ours(ids), ours(other)
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before != after)[:, position:].any(-1).all()


def test_the_same_call_twice_gives_the_same_bits(path):
    ours, _ = pair(context_length=129)
    first, second = (outputs_and_grads(ours, some_ids(T=129)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_results_are_never_overwritten(path, grad):
    """Neither the logits nor what a hook was shown on the way."""
    ours, _ = pair(n_layers=1)
    seen = []
    hooked = dict(ours.named_modules())
    del hooked["trf_blocks.0.ff.layers"], hooked["trf_blocks.0.ff.layers.0"]  # leave one part fused
    for module in hooked.values():
        module.register_forward_hook(
            lambda _, inputs, y: seen.extend((t, t.clone()) for t in (*inputs, y))
        )
    with torch.set_grad_enabled(grad):
        for seed in range(3):
            ours(some_ids(seed=seed))
    assert len(seen) >= 3 * 2 * 15
    assert all(torch.equal(given, kept) for given, kept in seen)


@functools.cache
def gpt2():
    torch.manual_seed(123)
    return fastgpt.GPTModel(GPT_CONFIG_124M).eval()


def test_gpt2_continues_as_the_book_prints():
    prompt = [15496, 11, 314, 716]  # "Hello, I am"
    tokens = fastgpt.generate_text_simple(gpt2(), torch.tensor([prompt]), 10, 1024)
    new = [27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657]
    assert tokens.tolist() == [prompt + new]


def test_gpt2_has_its_number_of_parameters():
    assert sum(p.numel() for p in gpt2().parameters()) == 163_009_536
    with torch.device("meta"):
        tied = fastgpt.GPTModel(GPT_CONFIG_124M)
    tied.out_head.weight = tied.tok_emb.weight
    assert sum(p.numel() for p in tied.parameters()) == 124_412_160


@pytest.mark.parametrize("training", [False, True])
def test_generation_leaves_the_mode_as_it_was(training):
    ours, _ = pair(drop_rate=0.0)
    fastgpt.generate_text_simple(ours.train(training), some_ids(T=3), 2, 32)
    assert all(module.training == training for module in ours.modules())


def test_generation_slides_past_the_context(path):
    ours, book = pair()
    prompt = some_ids(T=28)
    tokens = reference.generate_text_simple(book, prompt, 12, 32)
    assert torch.equal(fastgpt.generate_text_simple(ours, prompt, 12, 32), tokens)


@pytest.mark.parametrize(
    "ids",
    [
        some_ids(9, 4).t(),
        some_ids(2, 18)[:, ::2],
        some_ids(1, 9).expand(3, 9),
        some_ids().int(),
        some_ids(9, 4).int().t(),
    ],
    ids=["transposed", "every_other", "expanded", "int32", "int32_transposed"],
)
def test_layouts_of_ids(ids):
    assert_same_model(*pair(), ids)


BAD_IDS = {
    "too_long": (some_ids(T=33), ValueError, "33.*32"),
    "past_the_vocabulary": (torch.tensor([[3, 61, 5]]), IndexError, r"\b61\b"),
    "negative": (torch.tensor([[3, 5, -2]]), IndexError, "-2"),
    "int32_outside": (torch.tensor([[3, 7777]], dtype=torch.int32), IndexError, "7777"),
    "float": (some_ids().float(), TypeError, "float32"),
    "bool": (some_ids().bool(), TypeError, "bool"),
    "list": ([[1, 2, 3]], TypeError, "list"),
    "one_dimension": (some_ids()[0], ValueError, r"\(9,\)"),
    "three_dimensions": (some_ids()[None], ValueError, r"\(1, 2, 9\)"),
}


@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_bad_ids_are_refused_and_change_nothing(bad, grad):
    ids, error, message = BAD_IDS[bad]
    ours, _ = pair(drop_rate=0.1)
    ours.eval()
    logits = ours(some_ids())
    weights = copy.deepcopy(ours.state_dict())
    ours.train()
    generator = torch.get_rng_state()
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        ours(ids)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in ours.modules())
    assert all(torch.equal(tensor, weights[key]) for key, tensor in ours.state_dict().items())
    assert all(p.grad is None for p in ours.parameters())
    assert torch.equal(ours.eval()(some_ids()), logits)


def test_attention_alone_refuses_a_longer_sequence():
    att = fastgpt.MultiHeadAttention(8, 8, 5, 0.0, 2)
    with pytest.raises(ValueError, match=r"6.*5"):
        att(torch.randn(1, 6, 8))
    assert att(torch.randn(1, 5, 8)).shape == (1, 5, 8)


@pytest.mark.parametrize("key", CONFIG)
def test_a_config_with_a_missing_key(key):
    cfg = {k: v for k, v in CONFIG.items() if k != key}
    with pytest.raises(KeyError, match=key):
        fastgpt.GPTModel(cfg)


def test_widths_that_do_not_divide():
    with pytest.raises(ValueError, match=r"48.*5"):
        fastgpt.GPTModel({**CONFIG, "n_heads": 5})
    with pytest.raises(ValueError, match=r"48.*5"):
        fastgpt.MultiHeadAttention(48, 48, 8, 0.0, 5)


def test_extra_keys_are_ignored_and_the_config_is_left_alone():
    cfg = {**CONFIG, "emb_dims": 3, "dtype": torch.bfloat16}
    kept = dict(cfg)
    model = fastgpt.GPTModel(cfg)
    assert cfg == kept
    cfg["context_length"] = 1
    assert model(some_ids()).dtype == torch.float32
