"""`fastgpt train` as a user meets it: its options, and what it says of those that can't be."""

import io
import json
import os
import re
import sys

import pytest
import torch
from runs import CONFIG, losses, needs_table, train_arguments, write_inputs

import fastgpt
from fastgpt import cli
from fastgpt.training import checkpoint, memory, report, run_setup, trainer
from fastgpt.training.report import Step
from fastgpt.training.settings import load_model


@pytest.fixture
def inputs(tmp_path):
    needs_table()
    return write_inputs(tmp_path, letters=600)


def settings(out):
    return json.loads((out / "run.json").read_text())["settings"]


def test_a_run_and_what_it_leaves(inputs, capsys):
    out = inputs / "run"
    more = ("--steps", "5", "--sample", "a\nb", "--sample-tokens", "3", "--lr", "1e-3")
    assert cli.main(train_arguments(inputs, out, *more)) == 0
    said = capsys.readouterr().err
    for part in (
        "42,176 parameters, context 16, ",
        " steps per epoch; ",
        "step 1/5  loss ",
        " tokens/s, ",
        "% of peak",
    ):
        assert part in said
    assert said.count("validation") == 2
    assert said.count("\n  a b") == 2
    assert settings(out)["min_lr"] == 1e-4
    assert len(losses(out)) == 5
    assert {path.name for path in out.iterdir()} == {
        "checkpoints", "config.json", "log.csv", "loss.png", "model.safetensors", "run.json",
        "tokens",
    }  # fmt: skip

    assert cli.main(train_arguments(inputs, out)) == 2
    assert "already contains a run at step 5: continue it with --resume" in capsys.readouterr().err
    assert cli.main(["train", "--out", str(out), "--resume", "--steps", "7"]) == 0
    assert len(losses(out)) == 7
    capsys.readouterr()
    for steps in ("7", "3"):
        assert cli.main(["train", "--out", str(out), "--resume", "--steps", steps]) == 0
        said = capsys.readouterr().err
        assert f"step 7 of {steps} is already done: --steps N trains longer" in said
        assert "stopped" not in said
    assert settings(out)["lr"] == 1e-3


def test_epochs_and_starting_weights(inputs):
    first, second = inputs / "first", inputs / "second"
    assert cli.main(train_arguments(inputs, first, "--epochs", "0.25", "--lr", "0")) == 0
    # 1,200 tokens, of which 120 validate: 67 windows of 16.
    assert settings(first)["steps"] == 3
    trained = load_model(first)
    torch.manual_seed(123)
    fresh = fastgpt.GPTModel(CONFIG)
    # Only the decay, which goes with lr, could change them.
    assert all(map(torch.equal, trained.parameters(), fresh.parameters()))
    arguments = ["train", str(inputs / "text.txt"), "--out", str(second), "--from", str(first)]
    assert cli.main([*arguments, "--steps", "1", "--lr", "0", "--batch", "2"]) == 0
    again = load_model(second)
    assert all(map(torch.equal, again.parameters(), fresh.parameters()))


def test_no_epoch_leaves_the_model_as_it_starts(inputs, capsys):
    out, other = inputs / "none", inputs / "other"
    assert cli.main(train_arguments(inputs, out, "--epochs", "0")) == 0
    assert "step 0 of 0 is already done" in capsys.readouterr().err
    torch.manual_seed(123)
    fresh = fastgpt.GPTModel(CONFIG)
    saved = load_model(out)
    assert all(map(torch.equal, saved.parameters(), fresh.parameters()))
    assert cli.main(["train", "--out", str(out), "--resume", "--steps", "4"]) == 0
    assert cli.main(train_arguments(inputs, other, "--steps", "4")) == 0
    assert str(losses(out)) == str(losses(other))  # NaN stands where nothing was evaluated


def test_a_byte_order_mark_is_no_text(inputs):
    text = inputs / "text.txt"
    arguments = train_arguments(inputs, inputs / "run", "--epochs", "0")
    assert cli.main(arguments) == 0
    marked = inputs / "marked.txt"
    marked.write_bytes("\ufeff".encode() + text.read_bytes())
    (inputs / "config.json").write_bytes("\ufeff".encode() + (inputs / "config.json").read_bytes())
    arguments = [str(marked) if a == str(text) else a for a in arguments]
    arguments[arguments.index(str(inputs / "run"))] = str(inputs / "marked")
    assert cli.main(arguments) == 0
    digests = {
        json.loads((inputs / n / "run.json").read_text())["digest"] for n in ("run", "marked")
    }
    assert len(digests) == 1


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are UTF-8 here")
def test_names_that_are_no_text(inputs, capsys):
    strange = inputs / "caf\udce9"
    strange.mkdir()
    for name in ("text.txt", "config.json"):
        (inputs / name).rename(strange / name)
    out = strange / "run"
    assert cli.main(train_arguments(strange, out, "--steps", "2")) == 0
    assert cli.main(["train", "--out", str(out), "--resume", "--steps", "3"]) == 0
    assert len(losses(out)) == 3
    assert cli.main(["generate", "--model", str(out), "a", "--max-new-tokens", "2"]) == 0
    torch.save(load_model(out).state_dict(), strange / "model.pth")
    assert load_model(strange).cfg == load_model(out).cfg
    assert "Traceback" not in capsys.readouterr().err


def test_a_step_that_memory_cannot_hold_is_refused(inputs, capsys, monkeypatch):
    out = inputs / "run"
    assert cli.main(train_arguments(inputs, out, "--batch", "100000000")) == 2
    said = capsys.readouterr().err
    assert re.search(
        r"a step needs at least [\d,]+\.\d GB of memory, but [\d,]+\.\d GB are avail", said
    )
    assert not out.exists()
    least = memory.least_bytes(CONFIG, 6, bfloat16=False, tied=False)
    monkeypatch.setattr(memory, "available_bytes", lambda device: least - 1)
    assert cli.main(train_arguments(inputs, out, "--steps", "1")) == 2
    assert "choose a smaller --micro-batch" in capsys.readouterr().err
    assert cli.main(train_arguments(inputs, out, "--steps", "1", "--micro-batch", "3")) == 0


def test_what_a_step_takes_at_least():
    cfg = fastgpt.GPT_CONFIG_124M
    alone = memory.least_bytes(cfg, 1, bfloat16=False, tied=True)
    assert alone == 16 * 124_318_464  # but for biases and norms, which are left out
    # In tests/test_memory.py such a step peaks at under 6 GB.
    assert 4e9 < memory.least_bytes(cfg, 8, bfloat16=False, tied=True) < 6e9
    assert memory.available_bytes(torch.device("cpu")) > 0


def test_memory_that_ends_on_the_way_is_one_line(inputs, capsys, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "run", lambda self: torch.empty(1 << 58))
    assert cli.main(train_arguments(inputs, inputs / "run", "--steps", "1")) == 1
    said = capsys.readouterr().err.splitlines()
    assert "DefaultCPUAllocator: can't allocate memory" in said[-1]
    assert said[-1].endswith("there is no checkpoint yet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "text.txt is empty"),
        (b"caf\xe9\n", "text.txt is not UTF-8 text: byte 0xe9 at line 1 or shortly after"),
        (b"a\nb\nc\n", "the text has 6 tokens, too short for a context of 16"),
        (b"Hello\n" * 99, "the text has token 15496, but the vocabulary has 256 tokens"),
    ],
)
def test_bad_texts(inputs, capsys, text, message):
    (inputs / "text.txt").write_bytes(text)
    assert cli.main(train_arguments(inputs, inputs / "run")) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastgpt train: ")
    assert said.count("\n") == 1
    assert message in said
    assert not (inputs / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config", "125M"], "config '125M' is neither one of 124M, 355M, 774M, 1558M, toy nor"),
        (["--min-lr", "1"], "min_lr 1 is above lr"),
        (["--precision", "float16"], "precision 'float16' is not auto, float32 or bfloat16"),
        (["--device", "cuda"], "device 'cuda' is not available"),
        (["--fsdp"], "start them with torchrun"),
        (["--sample", "Hello"], "the sample has token 15496, but the vocabulary has 256 tokens"),
        (["--sample", ""], "the sample has token 50256, but the vocabulary has 256 tokens"),
        (["--from", "nowhere"], "--from has its own config"),
    ],
)
def test_bad_options(inputs, capsys, more, message):
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("it is available")
    assert cli.main([*train_arguments(inputs, inputs / "run"), *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


@pytest.mark.skipif(os.name == "nt", reason="no locks on folders there")
def test_one_run_at_a_time_in_a_folder(inputs, capsys):
    arguments = train_arguments(inputs, inputs / "run", "--steps", "2")
    with checkpoint.claimed(inputs / "run"):
        assert cli.main(arguments) == 2
    assert "another process is training in " in capsys.readouterr().err
    assert cli.main(arguments) == 0


def test_a_sample_with_a_token_that_no_text_has(inputs, capsys, monkeypatch):
    def padding(model, idx, new, context):
        return torch.cat([idx, torch.full((1, new), 50300)], dim=1)

    monkeypatch.setattr(trainer, "generate_text_simple", padding)
    cfg = json.dumps(CONFIG | {"vocab_size": 50304, "emb_dim": 8})
    (inputs / "config.json").write_text(cfg)
    more = ("--steps", "1", "--sample", "Hello", "--sample-tokens", "2")
    assert cli.main(train_arguments(inputs, inputs / "run", *more)) == 0
    assert "Hello\ufffd\ufffd" in capsys.readouterr().err


def test_nothing_to_resume(inputs, capsys):
    assert cli.main(["train", "--resume", "--out", str(inputs / "gone")]) == 2
    assert "gone has no checkpoint to resume from: give the texts" in capsys.readouterr().err
    assert not (inputs / "gone").exists()


def test_a_run_without_a_checkpoint_resumes_as_it_was_asked_for(inputs, capsys, monkeypatch):
    first, out = inputs / "first", inputs / "run"
    assert cli.main(train_arguments(inputs, first, "--steps", "1")) == 0
    arguments = ["train", str(inputs / "text.txt"), "--out", str(out), "--from", str(first)]
    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "run", lambda self: False)  # ends as if killed
        assert cli.main([*arguments, "--steps", "2", "--batch", "2", "--lr", "0"]) == 130
    before = json.loads((out / "run.json").read_text())
    assert before["start"] == str(first)
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0
    assert json.loads((out / "run.json").read_text()) == before
    begun, went_on = (load_model(folder).parameters() for folder in (first, out))
    assert all(map(torch.equal, begun, went_on))
    capsys.readouterr()
    assert cli.main(["train", "--out", str(out), "--resume", "--from", str(out)]) == 2
    assert "has a different --from" in capsys.readouterr().err


def test_what_can_be_refused_before_the_text_is_read(inputs, capsys, monkeypatch):
    monkeypatch.setattr(run_setup, "tokenise", None)
    assert cli.main(train_arguments(inputs, inputs / "run", "--validation", "0")) == 2
    assert "validation 0 is not between 0 and 1" in capsys.readouterr().err


def test_what_a_resumed_run_keeps(inputs, capsys):
    out = inputs / "run"
    arguments = train_arguments(inputs, out, "--steps", "2")
    assert cli.main(arguments) == 0
    other = inputs / "other.txt"
    other.write_text("b\n" * 900)
    again = ["train", "--resume", "--out", str(out)]
    for more, message in (
        (["--seed", "9"], "--seed is 9, but the run in"),
        (["--batch", "2"], "--batch is 2, but the run in"),
        (["--context", "8"], "has a different --config or --context"),
        (["--config", "toy"], "has a different --config or --context"),
        ([str(other)], "is on a different text"),
    ):
        capsys.readouterr()
        assert cli.main([*again, *more]) == 2
        assert message in capsys.readouterr().err
    out = out.rename(inputs / "moved")
    again[-1] = arguments[3] = str(out)
    assert cli.main([*again, "--steps", "2"]) == 0
    for path in (out / "tokens").iterdir():
        path.unlink()
    assert cli.main(again) == 2
    assert "give the texts again" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume", "--steps", "3"]) == 0
    (checkpoint.checkpoints(out)[-1] / "optimizer.pt").write_bytes(b"broken")
    assert cli.main([*again, "--steps", "4"]) == 2
    assert "optimizer.pt can't be loaded" in capsys.readouterr().err


def test_no_run_over_a_model_from_another_run(inputs, capsys):
    out = inputs / "model"
    out.mkdir()
    fastgpt.GPTModel(CONFIG).save_pretrained(out)
    assert cli.main(train_arguments(inputs, out)) == 2
    assert "already contains a model from another run" in capsys.readouterr().err


def test_without_matplotlib(inputs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(train_arguments(inputs, inputs / "run", "--steps", "1")) == 0
    assert "no loss.png, because matplotlib is missing" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
def test_bfloat16_and_accumulation_are_near_float32(inputs):
    runs = {}
    for name, more in (
        ("float32", []),
        ("accumulated", ["--micro-batch", "4"]),
        ("bfloat16", ["--precision", "bfloat16"]),
    ):
        config = inputs / "config.json"
        config.write_text(json.dumps(CONFIG | {"drop_rate": 0.0}))
        assert cli.main(train_arguments(inputs, inputs / name, "--steps", "4", *more)) == 0
        runs[name] = [loss for loss, _ in losses(inputs / name)]
    assert runs["accumulated"] == pytest.approx(runs["float32"], rel=1e-5)
    assert runs["bfloat16"] == pytest.approx(runs["float32"], rel=2e-2)
    assert runs["bfloat16"] != pytest.approx(runs["float32"], rel=1e-6)


def test_the_bar_and_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    row = Step(1, 50, 2.5, 1e-3, 0.5, 1e3, 0.25, 2**30, None)
    rows = [",".join(Step._fields), *(",".join(map(str, row._replace(step=n))) for n in (1, 2))]
    (tmp_path / "log.csv").write_text("\n".join([*rows, "3,150,2."]).replace("None", ""))
    console = report.Console(tmp_path, stream)
    console.reading(5, 10)
    console.start(1, 9, "on this machine")
    console.step(row._replace(step=2, tokens=100, loss=1.5, validation_loss=1.25), 9)
    console.sample("so it\nwent")
    console.saved(2)
    console.end(2, False)
    console.close()
    said = stream.getvalue()
    for part in ("on this machine", "loss 1.500, validation 1.250, 1,000 tokens/s, 25% of peak",
                 "1.00 GiB, 0:00:00 left", "so it went", "stopped at step 2"):  # fmt: skip
        assert part in said, said
    assert "\N{HORIZONTAL ELLIPSIS}" not in said  # on 80 columns
    log = report.read_log(tmp_path / "log.csv")
    assert [(row["step"], row["loss"]) for row in log] == [("1", "2.5"), ("2", "1.5")]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("has", [True, False], ids=["sm_80", "sm_75"])
def test_auto_takes_no_emulated_bfloat16(monkeypatch, has):
    """float32 instead: float16 would need its gradients scaled."""

    def supported(including_emulation=True):
        return has or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert trainer.takes_bfloat16("auto", torch.device("cuda")) == has
    assert not trainer.takes_bfloat16("auto", torch.device("cpu"))
