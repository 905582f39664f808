"""The book's checkpoints and dictionaries: every form of them, and what is wrong with one."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from pairs import CONFIG, assert_same_logits, pair, same_weights, shake, some_ids

import fastgpt
from fastgpt import GPTModel, WeightsError, reference, weights
from fastgpt.weights import files

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")

SMALL = CONFIG | {"qkv_bias": False}


def wrapped(state, prefix):
    return {prefix + name: t for name, t in state.items()}


CHECKPOINTS = {
    "state dict": lambda state: state,
    "chapter 5": lambda state: {
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
    },
    "compiled": lambda state: wrapped(state, "_orig_mod."),
    "parallel": lambda state: wrapped(state, "module."),
    "both": lambda state: wrapped(state, "module._orig_mod."),
    "compiled blocks": lambda state: {
        name.replace("trf_blocks.0.", "trf_blocks.0._orig_mod."): t for name, t in state.items()
    },
    "Lightning": lambda state: {
        "epoch": 1,
        "global_step": 7,
        "state_dict": wrapped(state, "model."),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}],
        "loops": {"fit_loop": {"state_dict": {}}},
    },
    "Lightning, compiled": lambda state: {"state_dict": wrapped(state, "net.gpt._orig_mod.")},
    "nanoGPT's form": lambda state: {
        "model": wrapped(state, "_orig_mod."),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
        "model_args": {"n_layer": 2},
        "iter_num": 3,
    },
    "no masks": lambda state: {n: t for n, t in state.items() if not n.endswith("mask")},
}


class TestTheBooksFiles:
    @pytest.mark.parametrize("kind", CHECKPOINTS)
    @pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
    def test_loads(self, tmp_path, kind, qkv_bias):
        _, book = pair(qkv_bias=qkv_bias)
        torch.save(CHECKPOINTS[kind](book.state_dict()), tmp_path / "model.pth")
        ours = GPTModel.from_pretrained(tmp_path / "model.pth", {"n_heads": 3})
        assert same_weights(ours, book)
        assert_same_logits(ours, book)
        assert ours.cfg == {**CONFIG, "qkv_bias": qkv_bias, "drop_rate": 0.0}
        assert same_weights(GPTModel.from_pretrained(tmp_path, book_config(book, qkv_bias)), book)

    def test_a_tied_head_stays_tied(self, tmp_path):
        _, book = pair()
        book.out_head.weight = book.tok_emb.weight
        torch.save(book.state_dict(), tmp_path / "model.pth")
        safetensors.save_model(book, str(tmp_path / "model.safetensors"))
        for name in ("model.pth", "model.safetensors"):
            ours = GPTModel.from_pretrained(tmp_path / name, CONFIG)
            assert ours.out_head.weight is ours.tok_emb.weight
            assert_same_logits(ours, book)

    def test_an_equal_head_of_its_own_stays_apart(self, tmp_path):
        _, book = pair()
        with torch.no_grad():
            book.out_head.weight.copy_(book.tok_emb.weight)
        torch.save(book.state_dict(), tmp_path / "model.pth")
        ours = GPTModel.from_pretrained(tmp_path / "model.pth", CONFIG)
        assert ours.out_head.weight is not ours.tok_emb.weight

    def test_an_edited_mask_is_honoured(self, tmp_path):
        _, book = pair()
        book.trf_blocks[1].att.mask[:, :4] = 0
        torch.save(book.state_dict(), tmp_path / "model.pth")
        ours = GPTModel.from_pretrained(tmp_path / "model.pth", CONFIG)
        assert_same_logits(ours, book)
        target, _ = pair()
        fastgpt.load_weights(target, tmp_path / "model.pth")
        assert_same_logits(target, book)
        torch.save(pair()[1].state_dict(), tmp_path / "model.pth")
        fastgpt.load_weights(target, tmp_path / "model.pth")
        assert_same_logits(target, pair()[1])

    @pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
    def test_the_faster_variant(self, tmp_path, qkv_bias):
        ch04 = pytest.importorskip("llms_from_scratch.ch04", reason="needs the book's package")
        fast = shake(ch04.GPTModelFast({**CONFIG, "qkv_bias": qkv_bias})).eval()
        torch.save(fast.state_dict(), tmp_path / "model.pth")
        assert_same_logits(GPTModel.from_pretrained(tmp_path / "model.pth", {"n_heads": 3}), fast)

    def test_sizes_without_a_config(self, tmp_path):
        torch.save(pair()[0].state_dict(), tmp_path / "model.pth")
        with pytest.raises(WeightsError, match=r"pass cfg with n_heads$"):
            GPTModel.from_pretrained(tmp_path / "model.pth")
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        assert GPTModel.from_pretrained(tmp_path).cfg == CONFIG
        with pytest.raises(WeightsError, match=r"n_heads is 3, not 4"):
            GPTModel.from_pretrained(tmp_path, {**CONFIG, "n_heads": 4})

    def test_the_heads_of_gpt2s_sizes_are_known(self):
        cfg = {**CONFIG, "emb_dim": 1600, "n_layers": 48, "n_heads": 1}
        with torch.device("meta"):
            state = GPTModel(cfg).state_dict()
        source = files.Memory(state, "on meta")
        shapes = {name: stored.shape for name, stored in source.stored.items()}
        style = weights.style_of(shapes)
        assert weights.completed(weights.Sizes(), None, style, shapes).cfg["n_heads"] == 25


def book_config(book, qkv_bias):
    return {**CONFIG, "qkv_bias": qkv_bias}


def openai_params(model):
    """The book's dictionary of arrays, as it makes it of OpenAI's checkpoint."""

    def linear(*names):
        modules = [model.get_submodule(name) for name in names]
        both = (torch.cat([m.weight.t() for m in modules], 1), torch.cat([m.bias for m in modules]))
        return dict(zip("wb", (t.detach().numpy() for t in both), strict=True))

    def norm(module):
        return {"g": module.scale.detach().numpy(), "b": module.shift.detach().numpy()}

    params = {
        "wte": model.tok_emb.weight.detach().numpy(),
        "wpe": model.pos_emb.weight.detach().numpy(),
        **norm(model.final_norm),
        "blocks": [],
    }
    for i, block in enumerate(model.trf_blocks):
        name = f"trf_blocks.{i}."
        att = [f"{name}att.W_{part}" for part in ("query", "key", "value")]
        params["blocks"].append(
            {
                "ln_1": norm(block.norm1),
                "ln_2": norm(block.norm2),
                "attn": {"c_attn": linear(*att), "c_proj": linear(f"{name}att.out_proj")},
                "mlp": {
                    "c_fc": linear(f"{name}ff.layers.0"),
                    "c_proj": linear(f"{name}ff.layers.2"),
                },
            }
        )
    return params


def openai_variables(params, prefix="model/"):
    """The same arrays under the names, and with the leading 1, that OpenAI's checkpoint has."""
    flat = {}
    for name, array in files._flattened(params):
        name = name.replace("blocks/", "h", 1)
        name = f"ln_f/{name}" if name in ("g", "b") else name
        flat[prefix + name] = array[None] if name.endswith("/w") else array
    return flat


class TestLoadWeightsIntoGpt:
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    @pytest.mark.parametrize("form", ["nested", "flat", "read-only"])
    def test_as_the_books(self, tied, form):
        ch05 = pytest.importorskip("llms_from_scratch.ch05", reason="needs the book's package")
        source, book = pair()
        params = openai_params(source)
        ch05.load_weights_into_gpt(book, params)
        ours = GPTModel(CONFIG)
        if tied:
            ours.out_head.weight = ours.tok_emb.weight
        held = list(ours.parameters())
        if form == "read-only":
            for _, array in files._flattened(params):
                array.flags.writeable = False
        fastgpt.load_weights_into_gpt(ours, openai_variables(params) if form == "flat" else params)
        assert_same_logits(ours, book)
        assert all(new is old for new, old in zip(ours.parameters(), held, strict=True))
        assert torch.equal(ours.out_head.weight, source.tok_emb.weight)

    def test_into_the_books_model_and_in_its_dtype(self):
        source, book = pair()
        book = reference.GPTModel(CONFIG).to(torch.bfloat16)
        fastgpt.load_weights_into_gpt(book, openai_params(source))
        assert book.out_head.weight.dtype == torch.bfloat16
        source.out_head.weight = source.tok_emb.weight
        assert torch.equal(book.pos_emb.weight, source.pos_emb.weight.bfloat16())

    def test_faults_are_all_named_and_nothing_is_written(self):
        source, ours = pair()
        params = openai_params(shake(source))
        before = {name: t.clone() for name, t in ours.state_dict().items()}
        params["wpe"] = params["wpe"][:-1]
        params["blocks"][1]["mlp"]["c_fc"]["w"] = params["blocks"][1]["mlp"]["c_fc"]["w"].T
        params["blocks"][0]["ln_1"]["gamma"] = params["blocks"][0]["ln_1"].pop("g")
        del params["b"]
        with pytest.raises(WeightsError) as error:
            fastgpt.load_weights_into_gpt(ours, params)
        for text in (
            "wpe [31, 48], expected [32, 48]",
            "blocks/1/mlp/c_fc/w [192, 48], expected [48, 192]",
            "missing:\n    b\n    blocks/0/ln_1/g",
            "unexpected:\n    blocks/0/ln_1/gamma",
        ):
            assert text in str(error.value)
        assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())

    def test_biases_that_the_model_has_not(self):
        params, ours = openai_params(pair()[0]), GPTModel(SMALL)
        with pytest.raises(WeightsError, match=r"qkv_bias is False:\n *blocks/0/attn/c_attn/b\n"):
            fastgpt.load_weights_into_gpt(ours, params)
        for block in params["blocks"]:
            block["attn"]["c_attn"]["b"] = block["attn"]["c_attn"]["b"] * 0
        fastgpt.load_weights_into_gpt(ours, params)

    def test_models_that_cannot_be_filled(self):
        params = openai_params(pair()[0])
        with pytest.raises(TypeError, match="Linear is not the book's GPTModel"):
            fastgpt.load_weights_into_gpt(torch.nn.Linear(2, 2), params)
        with torch.device("meta"):
            empty = GPTModel(CONFIG)
        with pytest.raises(ValueError, match="meta"):
            fastgpt.load_weights_into_gpt(empty, params)
        lora, _ = pair()
        lora.trf_blocks[0].att.W_key = torch.nn.Sequential(lora.trf_blocks[0].att.W_key)
        with pytest.raises(WeightsError, match=r"W_key\.0\.weight[^$]*W_key\.weight"):
            fastgpt.load_weights_into_gpt(lora, params)


class TestLoadWeights:
    def test_into_a_model_that_is_there(self, tmp_path):
        source, ours = pair()[0], GPTModel(CONFIG).double()
        optimiser = torch.optim.SGD(ours.parameters(), lr=1.0)
        source.save_pretrained(tmp_path)
        fastgpt.load_weights(ours, tmp_path)
        assert same_weights(ours, source.double())
        ours(some_ids()).sum().backward()
        optimiser.step()
        assert not same_weights(ours, source)

    @pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
    def test_faults_are_all_named_and_nothing_is_written(self, tmp_path, name):
        state = {k: t for k, t in pair()[0].state_dict().items() if "mask" not in k}
        target = GPTModel(CONFIG)
        before = {k: t.clone() for k, t in target.state_dict().items()}
        del state["trf_blocks.0.norm1.scale"], state["out_head.weight"]
        state["trf_blocks.1.att.W_key.bias"] = torch.zeros(47)
        state["lora.A"] = torch.zeros(2)
        state["trf_blocks.1.norm2.shift"] = torch.zeros(48, dtype=torch.int64)
        save = safetensors.save_file if name.endswith("safetensors") else torch.save
        save(state, tmp_path / name)
        for load in (
            lambda: fastgpt.load_weights(target, tmp_path / name),
            lambda: GPTModel.from_pretrained(tmp_path / name, CONFIG),
        ):
            with pytest.raises(WeightsError) as error:
                load()
            for text in (
                "missing:\n    out_head.weight\n    trf_blocks.0.norm1.scale\n",
                "unexpected:\n    lora.A\n",
                "trf_blocks.1.att.W_key.bias [47], expected [48]",
                "trf_blocks.1.norm2.shift torch.int64",
            ):
                assert text in str(error.value)
        assert all(torch.equal(t, before[k]) for k, t in target.state_dict().items())

    def test_a_checkpoint_with_two_tensors_for_one_parameter(self, tmp_path):
        source, target = pair()
        source.save_pretrained(tmp_path)
        target.out_head.weight = target.tok_emb.weight
        with pytest.raises(WeightsError, match="one parameter, but two tensors"):
            fastgpt.load_weights(target, tmp_path)

    def test_heads_that_differ(self, tmp_path):
        pair()[0].save_pretrained(tmp_path)
        with pytest.raises(WeightsError, match=r"3 heads, the model 4"):
            fastgpt.load_weights(GPTModel({**CONFIG, "n_heads": 4}), tmp_path)


class TestFilesThatCannotBeRead:
    @pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
    @pytest.mark.parametrize("damage", ["cut", "empty", "text"])
    def test_damaged(self, tmp_path, name, damage):
        state = {k: t for k, t in pair()[0].state_dict().items() if "mask" not in k}
        (safetensors.save_file if name.endswith("safetensors") else torch.save)(
            state, tmp_path / name
        )
        whole = (tmp_path / name).read_bytes()
        broken = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"not weights at all"}
        (tmp_path / name).write_bytes(broken[damage])
        with pytest.raises(WeightsError, match=name):
            GPTModel.from_pretrained(tmp_path, CONFIG)

    def test_not_for_us_to_read(self, tmp_path, monkeypatch):
        def refuse(path, mode):
            raise PermissionError(13, "Permission denied", path)

        pair()[0].save_pretrained(tmp_path)
        monkeypatch.setattr(files, "open", refuse, raising=False)
        with pytest.raises(WeightsError, match=r"cannot be read: .*Permission denied"):
            GPTModel.from_pretrained(tmp_path)

    def test_a_pickled_model_runs_no_code(self, tmp_path):
        torch.save(pair()[0], tmp_path / "model.pth")
        message = r"save model.state_dict\(\) instead. \(Unsupported global: .* by default\)$"
        with pytest.raises(WeightsError, match=message):
            GPTModel.from_pretrained(tmp_path)

    def test_a_compressed_file_is_refused(self, tmp_path):
        torch.save(pair()[0].state_dict(), tmp_path / "stored.pth")
        with zipfile.ZipFile(tmp_path / "stored.pth") as stored:
            content = {name: stored.read(name) for name in stored.namelist()}
        with zipfile.ZipFile(tmp_path / "model.pth", "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in content.items():
                packed.writestr(name, data)
        with pytest.raises(WeightsError, match=r"is compressed, which torch.save never does"):
            GPTModel.from_pretrained(tmp_path, CONFIG)

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            (1, torch.zeros(2), "1 is a Tensor"),
            ("pos_emb.weight", torch.eye(32, 48).to_sparse(), "is not a dense tensor"),
            ("pos_emb.weight", torch.empty(32, 48, device="meta"), "has too few values"),
            ("pos_emb.weight", torch.zeros(1).expand(1 << 40, 48), "has too few values"),
            ("trf_blocks.999999999.norm1.scale", torch.zeros(48), "n_layers 1000000000"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch 2.14's
    def test_tensors_that_no_model_has(self, tmp_path, name, tensor, message):
        torch.save({**pair()[0].state_dict(), name: tensor}, tmp_path / "model.pth")
        with pytest.raises(WeightsError, match=message):
            GPTModel.from_pretrained(tmp_path, {"n_heads": 3})

    @pytest.mark.parametrize(
        "text",
        ["[" * 100_000, *(json.dumps(CONFIG | {"n_layers": n}) for n in (10**9, [], "2"))],
    )
    def test_configs_that_no_model_has(self, tmp_path, text):
        pair()[0].save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(text)
        too_deep = "recursion|Stack overflow"  # before and since Python 3.14
        with pytest.raises(WeightsError, match=rf"{too_deep}|n_layers (1000000000|\[\]|'2')"):
            GPTModel.from_pretrained(tmp_path)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "model.pth")
        with pytest.raises(WeightsError, match="is not a regular file"):
            GPTModel.from_pretrained(tmp_path / "model.pth", CONFIG)

    @pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"x": torch.zeros(2)}, {}])
    def test_something_else(self, tmp_path, content):
        torch.save(content, tmp_path / "model.pth")
        with pytest.raises(WeightsError, match=r"model\.pth"):
            GPTModel.from_pretrained(tmp_path)

    def test_weights_elsewhere_in_a_checkpoint(self, tmp_path):
        state = pair()[0].state_dict()
        torch.save({"epoch": 3, "ema": state, "raw": state}, tmp_path / "model.pth")
        with pytest.raises(WeightsError, match=r"has tensors under 'ema' and 'raw': save the"):
            GPTModel.from_pretrained(tmp_path)

    def test_two_models_in_one_file(self, tmp_path):
        state = pair()[0].state_dict()
        both = wrapped(state, "teacher.") | wrapped(state, "student.")
        torch.save(both, tmp_path / "model.pth")
        with pytest.raises(WeightsError, match=r"has tok_emb.weight twice"):
            GPTModel.from_pretrained(tmp_path)

    def test_an_index_with_shards_missing_or_outside(self, tmp_path):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two"}}))
        with pytest.raises(WeightsError, match=r"missing: one.safetensors, two$"):
            GPTModel.from_pretrained(tmp_path)
        index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
        with pytest.raises(WeightsError, match=r"outside its folder: \.\./one"):
            GPTModel.from_pretrained(tmp_path)
        index.write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))  # longer than a name can be
        with pytest.raises(WeightsError, match=r"files that are missing: xxx"):
            GPTModel.from_pretrained(tmp_path)
        index.write_text("{")
        with pytest.raises(WeightsError, match="cannot be read"):
            GPTModel.from_pretrained(tmp_path)

    def test_nothing_there(self, tmp_path, monkeypatch):
        with pytest.raises(FileNotFoundError, match=r"contains none of model.safetensors"):
            GPTModel.from_pretrained(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"nowhere.pth is neither a local path"):
            GPTModel.from_pretrained(tmp_path / "nowhere.pth")
        monkeypatch.chdir(tmp_path)
        Path("gpt2").mkdir()  # as the book's download calls its folder
        with pytest.raises(FileNotFoundError, match="on the Hub it is openai-community/gpt2"):
            GPTModel.from_pretrained("gpt2")

    @pytest.mark.parametrize("name", ["", "124M", "124M/model.ckpt", "124M/checkpoint"])
    def test_openais_own(self, tmp_path, name):
        """What the book's download leaves."""
        folder = tmp_path / "124M"
        folder.mkdir()
        for file in ("checkpoint", "hparams.json", "model.ckpt.data-00000-of-00001"):
            (folder / file).write_text("nothing that we can read")
        with pytest.raises(WeightsError, match=r"TensorFlow.* load_weights_into_gpt.*community/"):
            GPTModel.from_pretrained(tmp_path / name)
        pair()[0].save_pretrained(tmp_path)
        assert GPTModel.from_pretrained(tmp_path).cfg == CONFIG


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_the_file_passes(monkeypatch, tmp_path, error):
    model, _ = pair()
    torch.save(model.state_dict(), tmp_path / "model.pth")

    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(error):
        fastgpt.load_weights(model, tmp_path / "model.pth")
