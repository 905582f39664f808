"""The peers that hold a copy of the book's model, and what a precision costs in quality."""

import copy

import pytest
import torch

import fastgpt
from fastgpt.bench import foretold, measure, quality
from fastgpt.bench.errors import kl_divergence, largest_error
from fastgpt.bench.peers import PEERS, PRECISIONS, chosen
from fastgpt.bench.workloads import CONFIGS, EXPORTED, Models, Work

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnx.*"),
    pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning"),  # where bfloat16 is PyTorch's
]
# The largest mean divergence on the toy. The next precision down has ten times as much.
MOST_DIVERGENCE = dict(zip(PRECISIONS, (1e-12, 1e-5, 5e-5, 5e-5, 5e-3), strict=True))
EXPORTED_PEERS = [name for name, peer in PEERS.items() if peer.engine in EXPORTED]


@pytest.fixture(scope="module", params=[False, True], ids=["", "qkv_bias"])
def models(request):
    """The toy, with biases that are not 0 and norms that are not 1."""
    models = Models(CONFIGS["toy"] | {"qkv_bias": request.param})
    with torch.no_grad():
        for name, parameter in models.book.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
                models.fused.get_parameter(name).copy_(parameter)
    return models


@pytest.fixture
def int8_by_hand(monkeypatch):
    """A `fastgpt.quantize` that rounds the weights of a copy."""

    @torch.no_grad()
    def quantize(model, precision):
        levels = {"int8": 127, "int8-dynamic": 127, "int4": 7}[precision]
        model = copy.deepcopy(model)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                scale = module.weight.abs().amax(1, keepdim=True) / levels
                module.weight.copy_((module.weight / scale).round() * scale)
        return model

    monkeypatch.setattr(fastgpt, "quantize", quantize, raising=False)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", EXPORTED_PEERS)
@torch.no_grad()
def test_an_exported_peer_is_the_books_model(models, name, batch):
    peer = PEERS[name]
    if reason := peer.missing():
        pytest.skip(reason)
    work = Work("forward", "toy", batch, 17)
    try:
        run = models.other(peer)
    except RuntimeError as error:
        assert peer.precision == "bfloat16"
        pytest.skip(str(error))
    with models.in_float64():
        exact = models.book(work.ids)
    for _ in range(2):  # nothing of the first call is left
        logits = run(work.ids)
        mean, largest = kl_divergence(logits, exact)
        most = 1e-8 if name == "llama" else MOST_DIVERGENCE[peer.precision]  # GELU by a table
        assert abs(mean) <= largest < 10 * most
        assert mean < most
        if peer.is_float32:
            assert largest_error(logits, exact) < (1e-3 if name == "llama" else 1e-5)


@pytest.mark.parametrize("name", EXPORTED_PEERS)
@torch.no_grad()
def test_an_exported_peer_continues_as_a_full_pass_would(models, name):
    peer = PEERS[name]
    if reason := peer.missing():
        pytest.skip(reason)
    prompt = Work("forward", "toy", 3, 9).ids
    try:
        run = models.other(peer)
    except RuntimeError as error:
        assert peer.precision == "bfloat16"
        pytest.skip(str(error))
    got = run.generate(prompt, 12)
    assert got.shape == (3, 21)
    assert torch.equal(got[:, :9], prompt)
    logits = models.book(got[:, :-1])[:, 8:]
    chosen_logits = logits.gather(-1, got[:, 9:, None])[..., 0]
    behind = (logits.amax(-1) - chosen_logits).max()
    # Activations in int8, and weights in int4, move these logits by some tenths.
    most = {"float32": 0, "int8": 0.05, "bfloat16": 0.05}.get(peer.precision, 0.5)
    assert behind <= (1e-3 if name == "llama" else most)
    assert torch.equal(run.generate(prompt, 12), got)


UNEQUAL = Work("batch", "toy", 19, 24, 16, shortest=4, fewest=2)
SCORED = Work("score", "toy", 19, 24, shortest=2)


def run_of(work, models, name):
    if reason := PEERS[name].missing():
        pytest.skip(reason)
    return work.peers(models)[name]


@pytest.mark.parametrize("name", UNEQUAL.peer_names)
@torch.no_grad()
def test_each_prompt_gets_its_own_number_of_tokens_and_those_that_it_gets_alone(models, name):
    assert len(set(map(len, UNEQUAL.texts))) > 8
    assert len(set(UNEQUAL.counts)) > 8
    run = run_of(UNEQUAL, models, name)
    for _ in range(2):
        for got, prompt, new in zip(run(), UNEQUAL.texts, UNEQUAL.counts, strict=True):
            alone = fastgpt.reference.generate_text_simple(models.book, prompt[None], new, 64)
            assert torch.equal(got, alone[0])


@pytest.mark.parametrize("name", SCORED.peer_names)
@torch.no_grad()
def test_scores_are_the_log_probabilities_of_each_text_alone(models, name):
    for got, text in zip(run_of(SCORED, models, name)(), SCORED.texts, strict=True):
        logits = models.book(text[None, :-1])[0]
        assert torch.allclose(got, logits.log_softmax(-1)[range(len(text) - 1), text[1:]])


@pytest.mark.parametrize("name", ["plain", "hf", "ct2", "fastgpt"])
@torch.no_grad()
def test_a_model_in_loops_goes_round(name):
    work = Work("lookup", "toy in loops", 1, 24, 30)
    text = run_of(work, Models(work.cfg), name)()[0]
    assert text.tolist() == [20 + i % 20 for i in range(54)]


@torch.no_grad()
def test_drawn_tokens_are_the_same_with_guesses():
    work = Work("lookup", "toy", 1, 24, 30, drawn=True)
    runs = work.peers(Models(work.cfg))
    text = runs["plain"]()  # which makes the model
    assert text.shape == (1, 54)
    assert torch.equal(runs["fastgpt"](), text)
    assert torch.equal(runs["plain"](), text)


def test_kl_divergence():
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).expand(3, 50, 2, 2).log()
    q = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).expand(3, 50, 2, 2).log()
    one = 0.5 * torch.tensor(4 / 3).log().item()
    assert kl_divergence(q + 3.0, p) == pytest.approx((one / 2, one))
    assert kl_divergence(p, p) == (0, 0)
    q = q.clone()
    q[1, 2] = torch.nan
    assert str(kl_divergence(q, p)) == "(nan, nan)"


@pytest.mark.usefixtures("int8_by_hand")
def test_our_precisions_are_peers_that_leave_the_model_as_it_is(models):
    before = copy.deepcopy(models.fused.state_dict())
    work = Work("forward", "toy", 2, 9)
    names = chosen(["fastgpt"], PRECISIONS)
    assert names == ["fastgpt", *(f"fastgpt {precision}" for precision in PRECISIONS[1:])]
    with torch.no_grad():
        exact = models.fused(work.ids)
        for kind in ("forward", "decode"):
            runs = Work(kind, "toy", 2, 9, 4 if kind == "decode" else 0).peers(models)
            for name in names:
                got = runs[name]()
                if kind == "forward":
                    assert (largest_error(got, exact) > 1e-4) == (name != "fastgpt")
                else:
                    assert got.shape == (2, 13)
    for name, value in models.fused.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.usefixtures("int8_by_hand")
def test_quality_of_each_precision(monkeypatch):
    monkeypatch.setattr(quality, "STEPS", 30)
    rows = quality.quality(["bfloat16", "int8", "int4"])
    assert [row["precision"] for row in rows] == ["float32", "bfloat16", "int8", "int4"]
    exact, bfloat16, int8, int4 = rows
    assert 2 < exact["perplexity"] < 30  # a byte drawn evenly has 256
    assert (exact["change"], exact["kl_mean"], exact["kl_largest"]) == (0, 0, 0)
    assert 0 < int8["kl_mean"] < int4["kl_mean"] / 10
    assert 0 < bfloat16["kl_mean"] < bfloat16["kl_largest"] < 1e-3
    assert int4["change"] == int4["perplexity"] / exact["perplexity"] - 1
    assert abs(int8["change"]) < 0.005
    assert abs(int4["change"]) < 0.05


@pytest.mark.usefixtures("int8_by_hand")
def test_only_our_narrow_precisions_are_tried_on_text(monkeypatch):
    asked = []
    monkeypatch.setattr(measure, "quality", lambda precisions: asked.append(precisions) or [])
    document = measure.measure([], chosen(["fastgpt", "openvino"], ["float32", "int8", "int4"]))
    assert asked == [["int8", "int4"]]
    assert document["quality"] == []
    assert "quality" in measure.measure([], chosen(["openvino"], ["int8"]))
    assert len(asked) == 1


def test_the_text_is_cut_into_windows_that_share_their_ends():
    windows = quality.help_text()
    assert windows.shape[1] == quality.CFG["context_length"] + 1
    assert len(windows) > 10 * quality.HELD_OUT
    assert torch.equal(windows[1:, 0], windows[:-1, -1])
    assert windows.max() < 256


def test_a_text_is_foretold():
    """From any beginning, by the book's model and ours."""
    torch.manual_seed(0)
    models, text = Models(CONFIGS["toy"]), torch.randint(50, (1, 60))
    for model in (models.book, models.fused):
        foretold.foretell_text(model, text[0])
        for start in (1, 20, 59):
            found = fastgpt.generate_text_simple(model, text[:, :start], 60 - start, 64)
            assert torch.equal(found, text)
