"""Weights from every kind of file, into the model or not at all, and out again."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import CONFIG, assert_same_logits, hugging_face, pair, same_weights, shake
from runs import PROCESSES

import fastgpt
from fastgpt import GPTModel, WeightsError

pytest.importorskip("safetensors", reason="needs safetensors")
pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers isn't installed")


class TestHuggingFace:
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    @pytest.mark.parametrize("shards", ["one", "several"])
    def test_loads(self, transformers, tmp_path, tied, shards):
        theirs = hugging_face(tie_word_embeddings=tied)
        theirs.save_pretrained(tmp_path, max_shard_size="1GB" if shards == "one" else "60KB")
        assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (shards == "one")
        ours = GPTModel.from_pretrained(tmp_path)
        assert_same_logits(ours, theirs)
        assert (ours.out_head.weight is ours.tok_emb.weight) == tied
        assert not ours.training

    @pytest.mark.parametrize("shards", [1, 2])
    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
    def test_loads_torch_files(self, transformers, tmp_path, shards, legacy):
        theirs = hugging_face()
        theirs.config.save_pretrained(tmp_path)
        state = {name: t for name, t in theirs.state_dict().items() if name != "lm_head.weight"}
        state = {name.removeprefix("transformer."): t for name, t in state.items()}
        state["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()  # the hub's gpt2 has these
        state["h.1.attn.masked_bias"] = torch.tensor(-1e4)
        options = {"_use_new_zipfile_serialization": not legacy}
        if shards == 1:
            torch.save(state, tmp_path / "pytorch_model.bin", **options)
        else:
            names = {name: f"part-{i % 2}.bin" for i, name in enumerate(state)}
            for part in set(names.values()):
                chosen = {name: t for name, t in state.items() if names[name] == part}
                torch.save(chosen, tmp_path / part, **options)
            index = json.dumps({"weight_map": names})
            (tmp_path / "pytorch_model.bin.index.json").write_text(index)
        assert_same_logits(GPTModel.from_pretrained(tmp_path), theirs)

    def test_settings_beyond_the_books_config(self, transformers, tmp_path):
        changes = {"layer_norm_epsilon": 1e-2, "embd_pdrop": 0.3, "attn_pdrop": 0.4}
        theirs = hugging_face(**changes)
        theirs.save_pretrained(tmp_path)
        ours = GPTModel.from_pretrained(tmp_path)
        assert_same_logits(ours, theirs)
        block = ours.trf_blocks[1]
        assert (ours.drop_emb.p, block.att.dropout.p, block.drop_shortcut.p) == (0.3, 0.4, 0.1)
        ours.save_pretrained(tmp_path)
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
        assert {name: getattr(again.config, name) for name in changes} == changes
        assert GPTModel.from_pretrained(tmp_path, {"drop_rate": 0.2}).drop_emb.p == 0.2

    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("activation_function", "relu"),
            ("scale_attn_by_inverse_layer_idx", True),
            ("n_inner", 100),
            ("model_type", "llama"),
        ],
    )
    def test_another_architecture_is_refused(self, transformers, tmp_path, setting, value):
        hugging_face().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text()) | {setting: value}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(WeightsError, match=rf"{setting} '?{value}"):
            GPTModel.from_pretrained(tmp_path)

    def test_a_head_of_its_own_in_a_config_that_says_tied(self, tmp_path):
        ours, _ = pair()
        ours.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        assert same_weights(GPTModel.from_pretrained(tmp_path), ours)
        with torch.no_grad():
            ours.out_head.weight.copy_(ours.tok_emb.weight)
        ours.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        loaded = GPTModel.from_pretrained(tmp_path)
        assert loaded.out_head.weight is loaded.tok_emb.weight


def saved_until(place, moment):
    """Saves, and dies before that many calls that change the folder."""
    calls = itertools.count(1)

    def or_die(change):
        def changed(*args, **kwargs):
            if next(calls) == moment:
                os._exit(9)
            return change(*args, **kwargs)

        return changed

    for name in ("fsync", "unlink", "replace"):
        setattr(os, name, or_die(getattr(os, name)))
    pair()[0].save_pretrained(place)


class TestSavePretrained:
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    @pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
    def test_hugging_face_loads_it(self, transformers, tmp_path, tied, qkv_bias):
        ours, _ = pair(qkv_bias=qkv_bias, drop_rate=0.1)
        if tied:
            ours.out_head.weight = ours.tok_emb.weight
        ours.eval().save_pretrained(tmp_path / "new" / "folder")
        theirs, told = transformers.GPT2LMHeadModel.from_pretrained(
            tmp_path / "new" / "folder", output_loading_info=True
        )
        assert not any(told.values())
        assert_same_logits(ours, theirs)
        assert (theirs.lm_head.weight is theirs.transformer.wte.weight) == tied
        again = GPTModel.from_pretrained(tmp_path / "new" / "folder")
        assert same_weights(again, ours)
        assert again.cfg == ours.cfg
        assert (again.out_head.weight is again.tok_emb.weight) == tied
        assert sorted(os.listdir(tmp_path / "new" / "folder")) == [
            "config.json",
            "model.safetensors",
        ]

    def test_files_are_for_whom_the_umask_says(self, tmp_path):
        pair()[0].save_pretrained(tmp_path)
        modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
        assert modes["model.safetensors"] == modes["config.json"]

    # Sums with an address overflow the narrow ones.
    @pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint16])
    def test_sizes_that_numpy_made(self, tmp_path, integer):
        given = {name: integer(size) for name, size in CONFIG.items()}
        given |= {"drop_rate": np.float32(0.5), "qkv_bias": np.bool_(True)}
        model = GPTModel(given)
        model.final_norm.eps = np.float32(1e-5)
        for block in model.trf_blocks:
            block.norm1.eps = block.norm2.eps = model.final_norm.eps
        model.save_pretrained(tmp_path)
        assert_same_logits(GPTModel.from_pretrained(tmp_path), model.eval())

    def test_dtype(self, transformers, tmp_path):
        ours = pair()[0].to(torch.bfloat16)
        ours.save_pretrained(tmp_path)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
        assert theirs.dtype == torch.bfloat16
        assert same_weights(GPTModel.from_pretrained(tmp_path, dtype=torch.bfloat16), ours)
        assert same_weights(GPTModel.from_pretrained(tmp_path), ours.float())

    def test_a_state_dict_in_place_of_the_models_own(self, tmp_path):
        ours, _ = pair()
        state = {name: t.clone() for name, t in ours.state_dict().items()}
        with torch.device("meta"):
            empty = GPTModel(CONFIG)
        empty.save_pretrained(tmp_path, state)
        assert same_weights(GPTModel.from_pretrained(tmp_path), ours)
        with pytest.raises(WeightsError, match=r"tok_emb.weight is on the meta device"):
            empty.save_pretrained(tmp_path / "other")
        assert not (tmp_path / "other").exists()

    @pytest.mark.parametrize("stage", ["save_file", "fsync"])
    def test_a_failure_leaves_the_old_files(self, tmp_path, monkeypatch, stage):
        ours, _ = pair()
        ours.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        def full(*args, **kwargs):
            raise OSError("no space left")

        target = "safetensors.torch.save_file" if stage == "save_file" else "os.fsync"
        monkeypatch.setattr(target, full)
        shake(ours)
        with pytest.raises(OSError, match="no space"):
            ours.save_pretrained(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("config", ["same", "other", "none"])
    def test_killed_at_any_moment(self, tmp_path, config):
        """The old pair of files, the new one, or an error; and the next save clears up."""
        new, found = pair()[0], set()
        for moment in itertools.count(1):
            place = tmp_path / str(moment)
            old = GPTModel(CONFIG | {"n_heads": 6 if config == "other" else 3})
            if config != "none":
                old.save_pretrained(place)
            process = PROCESSES.Process(target=saved_until, args=(place, moment))
            process.start()
            process.join()
            try:
                loaded = GPTModel.from_pretrained(place)
            except (WeightsError, FileNotFoundError) as error:
                found.add(type(error))
                message = str(error)
            else:
                right = new if same_weights(loaded, new) else old
                assert same_weights(loaded, right)
                assert loaded.cfg == {**right.cfg, "drop_rate": 0.0}
                found.add("new" if right is new else "old")
            old.save_pretrained(place)
            assert same_weights(GPTModel.from_pretrained(place), old)
            assert {path.name for path in place.iterdir()} == {"config.json", "model.safetensors"}
            if process.exitcode == 0:
                break
        assert moment > 5
        if config == "same":
            assert found == {"old", "new"}
        else:
            before = "old" if config == "other" else FileNotFoundError
            assert found == {before, WeightsError, "new"}
            assert re.search(r"a save to .* was interrupted: save the model there again", message)

    def test_over_the_file_that_it_came_from(self, tmp_path):
        ours, _ = pair()
        ours.save_pretrained(tmp_path)
        loaded = GPTModel.from_pretrained(tmp_path)
        shake(ours).save_pretrained(tmp_path)
        assert same_weights(GPTModel.from_pretrained(tmp_path), ours)
        assert not same_weights(loaded, ours)

    def test_what_hugging_face_has_no_place_for(self, tmp_path):
        ours, _ = pair()
        ours.out_head = torch.nn.Linear(48, 2)
        ours.trf_blocks[0].att.W_key = torch.nn.Sequential(ours.trf_blocks[0].att.W_key)
        ours.trf_blocks[1].ff.layers[1] = torch.nn.ReLU()
        with pytest.raises(WeightsError, match=r"trf_blocks.1.ff.layers.1 is a ReLU"):
            ours.save_pretrained(tmp_path)
        ours.trf_blocks[1].ff.layers[1] = torch.nn.GELU("tanh")
        with pytest.raises(WeightsError) as error:
            ours.save_pretrained(tmp_path)
        for text in (
            "out_head.bias has no place there",
            "out_head.weight is [2, 48], not [61, 48]",
            "trf_blocks.0.att.W_key.weight is missing",
            "trf_blocks.0.att.W_key.0.bias has no place there",
        ):
            assert text in str(error.value)
        ours, _ = pair()
        ours.trf_blocks[1].ff = torch.nn.Linear(48, 48)
        ours.pos_emb = torch.nn.Identity()
        with pytest.raises(WeightsError, match=r"MultiHeadAttention, Linear\n  pos_emb is a Ident"):
            ours.save_pretrained(tmp_path)
        ours, _ = pair()
        ours.trf_blocks[0].att.mask[:4, :4] = 0
        with pytest.raises(WeightsError, match=r"trf_blocks.0.att.mask is edited"):
            ours.save_pretrained(tmp_path)
        assert list(tmp_path.iterdir()) == []


class TestHub:
    @pytest.fixture
    def hub(self, transformers, tmp_path, monkeypatch):
        """huggingface_hub offline, with a cache of its own; returns what fills it."""
        pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        cache = tmp_path / "cache"

        def put(repository):
            base = cache / f"models--{repository.replace('/', '--')}"
            hugging_face().save_pretrained(base / "snapshots" / "abc")
            (base / "refs").mkdir()
            (base / "refs" / "main").write_text("abc")

        put.options = {"cache_dir": cache}
        return put

    @pytest.mark.parametrize(
        ("cached", "asked"),
        [
            ("openai-community/gpt2", "gpt2"),
            ("openai-community/gpt2", "openai-community/gpt2"),
            ("gpt2-xl", "gpt2-xl"),
            ("somebody/else", "somebody/else"),
        ],
    )
    def test_from_its_cache(self, transformers, hub, cached, asked):
        hub(cached)
        ours = GPTModel.from_pretrained(asked, **hub.options)
        assert_same_logits(ours, hugging_face())

    @pytest.mark.parametrize("name", ["gpt2-medium", "somebody/else"])
    def test_offline_says_how_to_fetch(self, hub, name):
        repository = "openai-community/gpt2-medium" if name == "gpt2-medium" else name
        with pytest.raises(FileNotFoundError, match=rf"hf download {repository} config.json"):
            GPTModel.from_pretrained(name, **hub.options)

    @pytest.mark.parametrize("message", ["404: no such repository", ""])
    def test_what_the_hub_answers_is_passed_on(self, hub, monkeypatch, message):
        def answer(*args, **options):
            raise OSError(message)

        monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
        with pytest.raises(FileNotFoundError, match=message or "OSError"):
            GPTModel.from_pretrained("gpt2", **hub.options)

    def test_a_folder_comes_before_the_hub(self, hub, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        pair()[0].save_pretrained("gpt2")
        assert same_weights(GPTModel.from_pretrained("gpt2"), pair()[0])

    def test_without_the_extra(self, tmp_path, monkeypatch):
        pair()[0].save_pretrained(tmp_path)
        torch.save(pair()[0].state_dict(), tmp_path / "model.pth")
        for module in ("safetensors", "safetensors.torch", "huggingface_hub"):
            monkeypatch.setitem(sys.modules, module, None)
        for action in (
            lambda: GPTModel.from_pretrained("gpt2"),
            lambda: GPTModel.from_pretrained(tmp_path),
            lambda: pair()[0].save_pretrained(tmp_path),
        ):
            with pytest.raises(ImportError, match=r"pip install safetensors huggingface_hub"):
                action()
        GPTModel.from_pretrained(tmp_path / "model.pth")  # torch alone reads it


def test_no_random_number_is_drawn_and_defaults_hold(tmp_path):
    pair()[0].save_pretrained(tmp_path)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        assert GPTModel.from_pretrained(tmp_path).tok_emb.weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)

    class Mine(GPTModel):
        pass

    assert type(Mine.from_pretrained(tmp_path)) is Mine


def test_the_documentations_examples(transformers, tmp_path, monkeypatch, capsys):
    """Each Python block of docs/weights.md, one after the other."""
    text = (Path(__file__).parents[1] / "docs" / "weights.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count("```python") > 5
    monkeypatch.chdir(tmp_path)
    hugging_face().save_pretrained("gpt2")
    torch.save(pair(n_layers=1)[1].state_dict(), "small.pth")
    names = {}
    for block in blocks:
        exec(block, names)
    assert "missing:\n    trf_blocks.1.att.out_proj.weight" in capsys.readouterr().out
    assert_same_logits(names["ours"].eval(), names["theirs"].eval())
    assert (tmp_path / "mine" / "model.safetensors").is_file()


def test_importing_loads_no_extra():
    code = "import sys, fastgpt; sys.exit(any(m in sys.modules for m in %r))"
    extras = ("safetensors", "huggingface_hub", "transformers")
    subprocess.run([sys.executable, "-c", code % (extras,)], check=True, timeout=120)


MEMORY = """
import sys, torch, fastgpt
from safetensors import safe_open
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if key in line)
path, cfg = sys.argv[1], dict(fastgpt.GPT_CONFIG_124M, qkv_bias=True)
torch.zeros(64, 64) @ torch.zeros(64, 64)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = status("VmRSS")
model = fastgpt.GPTModel.from_pretrained(path, cfg)
parameters = sum(p.numel() for p in model.parameters())
print(parameters, status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Random weights of 124M in each kind of file that can be mapped."""
    folder = tmp_path_factory.mktemp("124M")
    model = GPTModel({**fastgpt.GPT_CONFIG_124M, "qkv_bias": True})
    torch.save({"model_state_dict": model.state_dict()}, folder / "model.pth")
    model.out_head.weight = model.tok_emb.weight
    model.save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "parameters"), [("model.safetensors", 124_439_808), ("model.pth", 163_037_184)]
)
def test_loading_peaks_at_little_more_than_the_weights(full_size, name, parameters):
    command = [sys.executable, "-c", MEMORY, full_size / name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, peak = map(int, done.stdout.split())
    assert found == parameters
    assert 4 * parameters <= peak <= 1.2 * 4 * parameters
