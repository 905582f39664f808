"""State dicts between ours, the reference and the book's package; copies; the mask as a key."""

import copy
import io
import pickle

import pytest
import torch
from pairs import CONFIG, assert_same, assert_same_model, pair, some_ids
from torch import nn

import fastgpt
from fastgpt import reference

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")

MASKS = ["trf_blocks.0.att.mask", "trf_blocks.1.att.mask"]
CAUSAL = torch.ones(32, 32).triu(1)
# What a reader may do to a mask: let tokens see the first four, let them see only the last five.
PREFIX = torch.cat([torch.zeros(32, 4), CAUSAL[:, 4:]], dim=1)
WINDOW = CAUSAL + torch.ones(32, 32).tril(-5)


@pytest.fixture(params=["reference", "book"])
def theirs(request):
    """The reference, and the book's package where it is installed."""
    if request.param == "reference":
        return reference
    return pytest.importorskip(
        "llms_from_scratch.ch04", reason="the book's package isn't installed"
    )


def held_masks(model):
    return [name for name, buffer in model.named_buffers() if name.endswith("mask")]


def without_masks(state):
    return {key: value for key, value in state.items() if not key.endswith("mask")}


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_the_same_keys_shapes_and_dtypes(theirs, qkv_bias):
    cfg = {**CONFIG, "qkv_bias": qkv_bias}
    ours, right = fastgpt.GPTModel(cfg).state_dict(), theirs.GPTModel(cfg).state_dict()
    assert list(ours) == list(right)
    for key, tensor in right.items():
        assert (ours[key].shape, ours[key].dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("masks", [True, False], ids=["masks", "no_masks"])
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_loads_theirs(theirs, masks, assign):
    right, ours = theirs.GPTModel(CONFIG), fastgpt.GPTModel(CONFIG)
    state = right.state_dict() if masks else without_masks(right.state_dict())
    ours(some_ids())
    result = ours.load_state_dict(state, strict=True, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    shared = ours.tok_emb.weight.data_ptr() == right.tok_emb.weight.data_ptr()
    assert shared == assign
    assert_same_model(ours, right)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_theirs_loads_ours(theirs, assign):
    right, ours = theirs.GPTModel(CONFIG), fastgpt.GPTModel(CONFIG)
    right.load_state_dict(copy.deepcopy(ours.state_dict()), strict=True, assign=assign)
    assert_same_model(ours, right)


def test_no_mask_is_held_until_somebody_asks():
    ours, _ = pair()
    ours(some_ids()).sum().backward()
    ours.load_state_dict(ours.state_dict())
    copy.deepcopy(ours).double()(some_ids())
    assert held_masks(ours) == []
    assert torch.equal(ours.trf_blocks[0].att.mask, CAUSAL)


def test_built_on_meta_and_filled():
    _, book = pair()
    for assign in (True, False):
        with torch.device("meta"):
            ours = fastgpt.GPTModel(CONFIG)
        assert ours(some_ids().to("meta")).shape == (2, 9, 61)
        assert all(tensor.is_meta for tensor in ours.state_dict().values())
        if not assign:
            ours.to_empty(device="cpu")
        ours.load_state_dict(book.state_dict(), assign=assign)
        assert not any(tensor.is_meta for tensor in ours.state_dict().values())
        assert_same_model(ours, book)
        assert torch.equal(ours.trf_blocks[1].att.mask, CAUSAL)


def test_loads_a_state_dict_on_meta():
    with torch.device("meta"):
        ours, book = fastgpt.GPTModel(CONFIG), reference.GPTModel(CONFIG)
    ours.load_state_dict(book.state_dict(), assign=True)
    assert all(tensor.is_meta for tensor in ours.state_dict().values())


def test_a_mask_held_on_meta_is_filled():
    _, book = pair()
    with torch.device("meta"):
        ours = fastgpt.GPTModel(CONFIG)
    _ = ours.trf_blocks[0].att.mask
    ours.load_state_dict(book.state_dict(), assign=True)
    assert_same_model(ours, book)
    assert torch.equal(ours.state_dict()[MASKS[0]], CAUSAL)


@pytest.mark.parametrize("mask", [PREFIX, WINDOW], ids=["prefix", "window"])
class TestEditedMask:
    def edited(self, mask):
        ours, book = pair()
        ours(some_ids())
        for model in (ours, book):
            model.trf_blocks[1].att.mask.copy_(mask)
        return ours, book

    def test_is_honoured(self, path, mask):
        ours, book = self.edited(mask)
        _, plain = pair()
        assert not torch.allclose(book(some_ids()), plain(some_ids()), atol=1e-3)
        assert_same_model(ours, book)

    @pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
    def test_travels(self, mask, assign):
        ours, book = self.edited(mask)
        assert torch.equal(ours.state_dict()[MASKS[1]], mask)
        for source in (ours, book):
            for target in pair():
                target.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
                assert_same_model(target, book)

    def test_goes_again_with_a_causal_checkpoint(self, mask):
        ours, _ = self.edited(mask)
        _, plain = pair()
        ours.load_state_dict(plain.state_dict())
        assert_same_model(ours, plain)

    def test_stays_with_a_checkpoint_that_has_none(self, mask):
        ours, book = self.edited(mask)
        ours.load_state_dict(without_masks(book.state_dict()))
        assert_same_model(ours, book)

    def test_survives_copies_and_files(self, mask, tmp_path):
        ours, book = self.edited(mask)
        assert_same_model(copy.deepcopy(ours), book)
        torch.save(ours, tmp_path / "model.pt")
        assert_same_model(torch.load(tmp_path / "model.pt", weights_only=False), book)

    @pytest.mark.parametrize("way", ["setattr", "register_buffer", "_buffers", "bool"])
    def test_set_in_other_ways(self, mask, way):
        ours, book = pair()
        for model in (ours, book):
            att = model.trf_blocks[0].att
            if way == "setattr":
                att.mask = mask.clone()
            elif way == "register_buffer":
                att.register_buffer("mask", mask.clone())
            elif way == "_buffers":
                att._buffers["mask"] = mask.clone()
            else:
                att.mask = mask.bool()
        assert_same_model(ours, book)
        assert torch.equal(ours.state_dict()[MASKS[0]], book.state_dict()[MASKS[0]])


def resize(model, context):
    """The surgery that gives a model another context: positions and masks."""
    torch.manual_seed(3)
    model.pos_emb = nn.Embedding(context, 48)
    for block in model.trf_blocks:
        block.att.register_buffer("mask", torch.ones(context, context).triu(1))


@pytest.mark.parametrize("context", [20, 50])
class TestAnotherContext:
    def test_after_surgery(self, context):
        ours, book = pair()
        ours(some_ids())
        for model in (ours, book):
            resize(model, context)
        assert_same_model(ours, book, some_ids(T=context))
        with pytest.raises(ValueError, match=rf"{context + 1}.*{context}"):
            ours(some_ids(T=context + 1))

    @pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
    def test_after_surgery_and_a_checkpoint(self, context, assign):
        ours, book = pair()
        for model in (ours, book):
            resize(model, context)
        ours.load_state_dict(copy.deepcopy(book.state_dict()), assign=assign)
        assert ours.state_dict()[MASKS[0]].shape == (context, context)
        assert_same_model(ours, book, some_ids(T=context))
        with pytest.raises(ValueError, match=rf"{context + 1}.*{context}"):
            ours(some_ids(T=context + 1))
        ours.load_state_dict(ours.state_dict())

    def test_after_surgery_through_a_copy_and_a_cast(self, context):
        ours, book = pair()
        for model in (ours, book):
            resize(model, context)
        results = [copy.deepcopy(model).double()(some_ids(T=context)) for model in (ours, book)]
        assert_same(*results)

    def test_positions_alone_are_not_enough(self, context):
        ours, _ = pair()
        ours.pos_emb = nn.Embedding(context, 48)
        with pytest.raises(ValueError, match=rf"{max(context, 33)}.*{min(context, 32)}"):
            ours(some_ids(T=max(context, 33)))

    def test_a_mask_of_the_wrong_size_is_refused(self, theirs, context):
        cfg = {**CONFIG, "context_length": context}
        ours, other = fastgpt.GPTModel(CONFIG), theirs.GPTModel(cfg)
        state = {**ours.state_dict(), MASKS[1]: other.state_dict()[MASKS[1]]}
        with pytest.raises(RuntimeError, match=rf"{MASKS[1]}.*{context}.*32") as error:
            ours.load_state_dict(state)
        assert MASKS[0] not in str(error.value)
        assert torch.equal(ours.trf_blocks[1].att.mask, CAUSAL)


@pytest.mark.parametrize("change", ["missing", "unexpected", "wrong_shape"])
def test_errors_of_loading_are_the_references(change):
    messages = []
    for model in pair():
        state = model.state_dict()
        if change == "missing":
            del state["trf_blocks.0.ff.layers.0.bias"]
        elif change == "unexpected":
            state["trf_blocks.0.att.masked"] = torch.zeros(2)
        else:
            state["trf_blocks.0.norm1.scale"] = torch.zeros(2)
        with pytest.raises(RuntimeError) as error:
            model.load_state_dict(state)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_files(tmp_path):
    ours, book = pair()
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = fastgpt.GPTModel(CONFIG)
    fresh.load_state_dict(state)
    assert_same_model(fresh, book)
    torch.save(ours, tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same_model(whole, book)
    assert (tmp_path / "model.pt").stat().st_size < 4 * sum(
        p.numel() for p in ours.parameters()
    ) + 60_000


MOVES = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "meta": lambda m: m.to("meta"),
    "there_and_back": lambda m: m.double().float(),
}


@pytest.mark.parametrize("held", [False, True], ids=["not_held", "held"])
@pytest.mark.parametrize("move", MOVES)
def test_the_mask_moves_with_the_model(move, held):
    ours, book = pair()
    if held:
        _ = ours.trf_blocks[0].att.mask
    ours, book = MOVES[move](ours), MOVES[move](book)
    for mask in (ours.state_dict()[MASKS[0]], ours.trf_blocks[0].att.mask):
        right = book.state_dict()[MASKS[0]]
        assert (mask.dtype, mask.device) == (right.dtype, right.device)
        assert mask.is_meta or torch.equal(mask, right)


def test_prefixes_and_references_to_the_parameters():
    ours, book = pair()
    ours_state, right = (m.state_dict(prefix="gpt.", keep_vars=True) for m in (ours, book))
    assert list(ours_state) == list(right)
    assert ours_state["gpt.tok_emb.weight"] is ours.tok_emb.weight
    assert ours.state_dict()["out_head.weight"].data_ptr() == ours.out_head.weight.data_ptr()
    wrapped = nn.ModuleDict({"gpt": ours})
    wrapped.load_state_dict(nn.ModuleDict({"gpt": book}).state_dict())
    assert_same_model(ours, book)


def test_optimiser_checkpoints_go_by_position():
    ours, book = pair()
    optimisers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (book, ours)]
    for _ in range(2):
        book(some_ids()).square().mean().backward()
        optimisers[0].step()
    ours.load_state_dict(book.state_dict())
    optimisers[1].load_state_dict(copy.deepcopy(optimisers[0].state_dict()))
    for model, optimiser in zip((book, ours), optimisers, strict=True):
        optimiser.zero_grad()
        model(some_ids(seed=8)).square().mean().backward()
        optimiser.step()
    assert_same(ours(some_ids()), book(some_ids()), atol=1e-3)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: save_and_load(model),
}


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_whole_and_apart(how):
    ours, book = pair()
    ours.out_head.weight = ours.tok_emb.weight
    book.out_head.weight = book.tok_emb.weight
    ours(some_ids()).sum().backward()
    twin = COPIES[how](ours)
    assert twin.out_head.weight is twin.tok_emb.weight
    for p in ours.parameters():
        p.data.zero_()
    assert_same_model(twin, book)


def test_a_pickled_part():
    block = fastgpt.TransformerBlock(CONFIG)
    x = torch.randn(1, 5, 48)
    assert torch.equal(pickle.loads(pickle.dumps(block))(x), block(x))
