"""The scripts of examples/ as a reader runs them, on a small model and on the data beside them."""

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch
from runs import CONFIG, needs_table
from test_docs import ROOT

from fastgpt import GPT_CONFIG_124M, GPTModel, generate
from fastgpt.reference import GPTModel as Book
from fastgpt.training import format_input, text_to_token_ids, token_ids_to_text

EXAMPLES = ROOT / "examples"
SMALL = GPT_CONFIG_124M | {key: CONFIG[key] for key in ("emb_dim", "n_heads", "n_layers")}


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Runs one, and returns what its main returned: the losses."""
    needs_table()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMALL))

    def run(name, *arguments):
        namespace = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        common = ["--config", str(config), "--context", "128", "--lr", "0.003"]
        return namespace["main"]([*common, *map(str, arguments)])

    yield run
    for name in ("start", "classify"):
        sys.modules.pop(name, None)


def test_pretrain(script, tmp_path, capsys):
    losses = script("pretrain", "--epochs", 3, "--save", tmp_path / "model.pth")
    assert losses[-1] < losses[0] - 1
    assert "Every morning the keeper" in capsys.readouterr().out
    book = Book(SMALL | {"context_length": 128})
    book.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))


def test_classify(script, capsys):
    losses = script("classify", "--epochs", 8)
    assert losses[-1] < losses[0] - 0.05
    assert "epoch 8: loss" in capsys.readouterr().out


def test_classify_goes_on_from_a_trained_model(script, tmp_path):
    cfg = SMALL | {"context_length": 64}
    GPTModel(cfg).save_pretrained(tmp_path)
    assert len(script("classify", "--epochs", 1, "--model", tmp_path)) == 1


def test_instruct(script, tmp_path, capsys):
    path = tmp_path / "instruction-data-with-response.json"
    losses = script("instruct", "--epochs", 4, "--batch", 4, "--responses", path)
    assert losses[-1] < losses[0] - 1
    said = capsys.readouterr().out
    answered = json.loads(path.read_text())
    entries = json.loads((EXAMPLES / "instructions.json").read_text())
    assert [entry | {"model_response": ""} for entry in entries[20:22]] == [
        entry | {"model_response": ""} for entry in answered
    ]
    for entry in answered:
        assert f"answered: {entry['model_response']}\n" in said


def test_the_test_set_gets_the_answers_that_the_book_gives_it():
    """One by one, through generate."""
    tokenizer, answer = needs_table(), runpy_of("instruct")["answer"]
    torch.manual_seed(0)
    model = GPTModel(SMALL | {"context_length": 128, "drop_rate": 0.0}).eval()
    entries = json.loads((EXAMPLES / "instructions.json").read_text())[:3]
    answer(model, entries)
    for entry in entries:
        text = format_input(entry)
        ids = generate(model, text_to_token_ids(text, tokenizer), 256, 128, eos_id=50256)
        said = token_ids_to_text(ids, tokenizer)[len(text) :]
        assert entry["model_response"] == said.replace("### Response:", "").strip()


def test_padding_costs_nothing_but_its_first_token():
    collate = runpy_of("instruct")["collate"]
    inputs, targets = collate([[1, 2, 3, 4], [5, 6]], context=16)
    assert inputs.tolist() == [[1, 2, 3, 4], [5, 6, 50256, 50256]]
    assert targets.tolist() == [[2, 3, 4, 50256], [6, 50256, -100, -100]]
    inputs, targets = collate([[1, 2, 3, 4]], context=2)
    assert (inputs.tolist(), targets.tolist()) == ([[1, 2]], [[2, 3]])


def test_lora(script, capsys):
    losses = script("lora", "--epochs", 8, "--rank", 4)
    assert losses[-1] < losses[0] - 0.05
    assert "frozen" in capsys.readouterr().out


def test_lora_leaves_the_model_as_it_was_at_first():
    wrap = runpy_of("lora")["replace_linear"]
    model = GPTModel(CONFIG).eval()
    ids = torch.randint(CONFIG["vocab_size"], (2, 8))
    with torch.no_grad():
        before = model(ids)
        wrap(model, 4, 8.0)
        torch.testing.assert_close(model(ids), before, rtol=1e-5, atol=1e-5)
    assert not any(type(m).__name__ == "Linear" for m in model.trf_blocks[0].att.children())


def runpy_of(name):
    sys.path.insert(0, str(EXAMPLES))
    try:
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))
    finally:
        sys.path.remove(str(EXAMPLES))
        for module in ("start", "classify"):
            sys.modules.pop(module, None)


@pytest.mark.parametrize("name", ["pretrain", "classify", "instruct", "lora"])
def test_help(name):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--help"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "(default" not in done.stdout
    assert "--model" in done.stdout
