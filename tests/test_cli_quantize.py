"""`fastgpt quantize`, and the command line's other ways to and from quantised models."""

import pytest
import torch
from runs import needs_table
from test_cli_generate import CONFIG, run

import fastgpt
from fastgpt import GPTModel, cli
from fastgpt.training import train_model_simple
from fastgpt.training.settings import load_model

pytest.importorskip("safetensors", reason="needs safetensors")
pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")


@pytest.fixture
def model(tmp_path):
    needs_table()
    fastgpt.GPTModel(CONFIG | {"emb_dim": 64}).save_pretrained(tmp_path / "full")
    return tmp_path / "full"


@pytest.mark.parametrize(("precision", "group"), [("int8", 32), ("int4", 32), ("int4", 64)])
def test_writes_what_generate_reads(model, tmp_path, capsys, precision, group):
    out = tmp_path / "narrow"
    given = ["quantize", str(model), "--out", str(out), "--precision", precision]
    assert cli.main([*given, "--group", str(group)]) == 0
    said = capsys.readouterr()
    size = (out / "model.safetensors").stat().st_size
    assert said.out == f"{out}: {precision}, {size / 1e6:.1f} MB\n"
    right = fastgpt.quantize(load_model(model), precision, group)
    loaded = GPTModel.from_pretrained(out)
    assert loaded.out_head.group == right.out_head.group
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids), right(ids))
    text = run(capsys, out, "Every effort", "--max-new-tokens", "6")[0]
    if group == 32:
        direct = run(
            capsys, model, "Every effort", "--max-new-tokens", "6", "--quantize", precision
        )
        assert direct[0] == text
    # A second one would replace the first.
    assert cli.main(given) == 2
    assert "already contains a model; choose a different --out" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--quantize", "int8-dynamic"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_generates_in_a_dtype(model, capsys, monkeypatch, dtype, more):
    seen = []
    forward = fastgpt.ops.quantized_linear if more else torch.nn.functional.embedding

    def watched(x, *args, **kwargs):
        y = forward(x, *args, **kwargs)
        seen.append(y.dtype)
        return y

    place = "fastgpt.ops.quantized_linear" if more else "torch.nn.functional.embedding"
    monkeypatch.setattr(place, watched)
    with fastgpt.use_backend("reference"):
        run(capsys, model, "Every effort", "--max-new-tokens", "2", "--dtype", dtype, *more)
    assert set(seen) == {getattr(torch, dtype)}


def test_what_cannot_be(model, tmp_path, capsys):
    narrow = tmp_path / "narrow"
    assert cli.main(["quantize", str(model), "--out", str(narrow)]) == 0
    capsys.readouterr()
    odd = tmp_path / "odd"
    fastgpt.GPTModel(CONFIG | {"emb_dim": 48}).save_pretrained(odd)
    for arguments, said in (
        (["quantize", str(tmp_path / "gone"), "--out", "x"], "gone is neither a local path nor"),
        (["quantize", str(narrow), "--out", str(tmp_path / "x"), "--precision", "int4"], "as int4"),
        (
            ["quantize", str(odd), "--out", str(tmp_path / "x"), "--precision", "int4"],
            "width 48 is",
        ),
        (["generate", "--model", str(narrow), "a", "--quantize", "int4"], "cannot be loaded as in"),
    ):
        assert cli.main(arguments) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert not (tmp_path / "x").exists()
    for arguments in (["quantize", "gpt2"], ["quantize", "x", "--out", "y", "--precision", "int3"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)


def test_cannot_be_trained(model, tmp_path, capsys):
    narrow = tmp_path / "narrow"
    assert cli.main(["quantize", str(model), "--out", str(narrow)]) == 0
    (tmp_path / "text.txt").write_text("Every effort moves you. " * 40)
    given = ["train", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    assert cli.main([*given, "--from", str(narrow)]) == 2
    err = capsys.readouterr().err
    assert "nothing in this model can be trained" in err
    assert not (tmp_path / "run" / "run.json").exists()
    quantised = GPTModel.from_pretrained(narrow)
    optimizer = torch.optim.AdamW(quantised.parameters())
    with pytest.raises(ValueError, match="no parameter requires a gradient; a quantised"):
        train_model_simple(quantised, [], [], optimizer, "cpu", 1, 1, 1, "a", None)
