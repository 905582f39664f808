"""Quantised models in files: saved, loaded, quantised while they are read, and refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pairs import hugging_face
from quantized_models import KINDS, full, logits, put_lora, quantized

import fastgpt
from fastgpt import GPTModel, WeightsError

pytest.importorskip("safetensors", reason="needs safetensors")
pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")


def same_tensors(one, other):
    one, other = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (one, other))
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype and torch.equal(t, other[n]) for n, t in one.items()
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("precision", "group"), KINDS)
class TestRoundTrip:
    def test_saves_and_loads(self, tmp_path, precision, group, tied):
        model = quantized(precision, tied, group)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["quantization_config"] == {"precision": precision, "group": group}
        again = GPTModel.from_pretrained(tmp_path)
        assert same_tensors(again, model)
        assert torch.equal(logits(again), logits(model))
        assert {m.precision for m in again.modules() if hasattr(m, "precision")} == {precision}
        assert not again.training
        assert not any(p.requires_grad for p in again.parameters())
        if tied:
            assert again.tok_emb.scale is again.out_head.scale
        state = torch.get_rng_state()
        half = GPTModel.from_pretrained(tmp_path, dtype=torch.bfloat16, quantize=precision)
        assert torch.equal(torch.get_rng_state(), state)
        assert same_tensors(half, model.bfloat16())
        assert logits(half).dtype == torch.bfloat16

    @pytest.mark.parametrize("kind", ["ours", "pth", "transformers"])
    def test_quantises_while_reading(self, tmp_path, monkeypatch, precision, group, tied, kind):
        monkeypatch.setattr("fastgpt.weights.fill.SMALL_WINDOW", 30_000)  # several pieces a tensor
        given = full(tied, wide=group == 64)
        if kind == "transformers":
            theirs = hugging_face(n_embd=192, tie_word_embeddings=tied)
            theirs.save_pretrained(tmp_path)
            given = GPTModel.from_pretrained(tmp_path)
        elif kind == "ours":
            given.save_pretrained(tmp_path)
        else:
            torch.save(given.state_dict(), tmp_path / "model.pth")
        cfg = {"n_heads": 3}
        loaded = GPTModel.from_pretrained(tmp_path, cfg, quantize=precision, group=group)
        assert same_tensors(loaded, fastgpt.quantize(given, precision, group))
        if tied:
            assert loaded.tok_emb.scale is loaded.out_head.scale


def test_an_edited_mask_is_kept(tmp_path):
    given = full()
    given.trf_blocks[0].att.mask[:4, :4] = 0
    torch.save(given.state_dict(), tmp_path / "model.pth")
    loaded = GPTModel.from_pretrained(tmp_path, {"n_heads": 3}, quantize="int8")
    assert torch.equal(loaded.trf_blocks[0].att.mask, given.trf_blocks[0].att.mask)
    with pytest.raises(WeightsError, match=r"trf_blocks.0.att.mask is edited"):
        loaded.save_pretrained(tmp_path / "other")


def test_readers_that_cannot(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers isn't installed")
    quantized(tied=True).save_pretrained(tmp_path)
    for reader in (transformers.GPT2LMHeadModel, transformers.AutoModelForCausalLM):
        with pytest.raises(ValueError, match="quantization config"):
            reader.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"quantised to int8: load it with GPTModel.from_pretr"):
        fastgpt.load_weights(full(), tmp_path)
    with pytest.raises(WeightsError, match=r"cannot be loaded as int4: quantise the model that it"):
        GPTModel.from_pretrained(tmp_path, quantize="int4")
    full().save_pretrained(tmp_path / "full")
    for tied in (True, False):
        with pytest.raises(WeightsError, match=r"loaded into a quantised model: load them with"):
            fastgpt.load_weights(quantized(tied=tied), tmp_path / "full")


@pytest.mark.parametrize("entry", [{"precision": "int3"}, {"bits": 4}, "int8", {"precision": []}])
def test_an_entry_of_somebody_else(tmp_path, entry):
    full().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    with pytest.raises(WeightsError, match="has a quantization_config that cannot be read"):
        GPTModel.from_pretrained(tmp_path)


def test_files_that_do_not_fit_their_entry(tmp_path):
    quantized("int8").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"precision": "int4", "group": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError) as error:
        GPTModel.from_pretrained(tmp_path)
    for text in (
        "out_head.weight_int4 is missing",
        "out_head.weight_int8 has no place there",
        "out_head.scale is [61], not [61, 3]",
        "out_head.scale is torch.float32, not torch.bfloat16",
    ):
        assert text in str(error.value)


def test_what_cannot_be_saved(tmp_path):
    model = quantized()
    put_lora(model.trf_blocks[1])
    with pytest.raises(WeightsError, match=r"trf_blocks.1.att.W_key.A has no place there") as error:
        model.save_pretrained(tmp_path)
    assert "trf_blocks.1.att.W_key.weight_int8 is missing" in str(error.value)
    model = quantized()
    model.trf_blocks[1] = quantized("int4").trf_blocks[1]
    with pytest.raises(WeightsError, match="precisions differ: int4, int8"):
        model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="it is on the meta device"):
        quantized().to("meta").save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_quantised_while_reading(tmp_path):
    given = full()
    given.trf_blocks[1].att.W_value.weight.data[3, 3] = torch.inf
    given.save_pretrained(tmp_path)
    said = r"trf_blocks.1.att.W_value.weight cannot be quantised: it has values that are NaN"
    with pytest.raises(WeightsError, match=said):
        GPTModel.from_pretrained(tmp_path, quantize="int8")
    for precision, group, said in (
        ("int3", 32, "unknown precision 'int3'"),
        ("int4", 64, "W_query.weight cannot be quantised to int4: its width 96 is not a multiple"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            GPTModel.from_pretrained(tmp_path, quantize=precision, group=group)


MEMORY = """
import sys, torch, fastgpt
torch.set_num_threads(1)
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if key in line)
path, precision = sys.argv[1:]
small = dict(fastgpt.GPT_CONFIG_124M, vocab_size=61, emb_dim=96, n_layers=1)
fastgpt.GPTModel(small).save_pretrained(path + "/small")
fastgpt.GPTModel.from_pretrained(path + "/small", quantize=precision)  # imports all there is
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = status("VmRSS")
model = fastgpt.GPTModel.from_pretrained(path, quantize=precision)
held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
print(sum(held.values()), status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Random weights of 124M, the head tied."""
    folder = tmp_path_factory.mktemp("124M")
    model = GPTModel(fastgpt.GPT_CONFIG_124M)
    model.out_head.weight = model.tok_emb.weight
    model.save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_reading_peaks_at_little_more_than_the_result(full_size, precision):
    command = [sys.executable, "-c", MEMORY, full_size, precision]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    held, peak = map(int, done.stdout.split())
    assert held < (130e6 if precision == "int8" else 85e6)
    assert 0.9 * held <= peak <= 1.3 * held
