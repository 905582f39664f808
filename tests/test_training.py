"""Chapter 5's functions against the book's, token files, the order of windows, and the trainer."""

import io
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import time

import matplotlib
import pytest
import torch
from gpu_queue import queue_of
from runs import (
    CONFIG,
    Run,
    losses,
    needs_table,
    steps_done,
    train_arguments,
    trained,
    write_inputs,
)
from torch import nn

import fastgpt
from fastgpt import atomic_files, cli, training
from fastgpt.training import checkpoint, tokens, trainer
from fastgpt.training.data import Windows
from fastgpt.training.settings import Settings, SettingsError, load_model, read_config
from fastgpt.training.trainer import lr_factor

matplotlib.use("Agg")  # the book's chapter 5 imports pyplot

TEXT = "Every effort moves you, and naïve 猫 café owners say «so what» twice.  \n\n" * 12


@pytest.fixture(scope="module")
def encoding():
    return needs_table()


@pytest.fixture
def inputs(tmp_path):
    needs_table()
    return write_inputs(tmp_path)


def test_the_data_loader_is_the_books(encoding):
    ch02 = pytest.importorskip("llms_from_scratch.ch02")
    for options in (
        {"max_length": 8, "stride": 3},
        {"max_length": 7, "stride": 7, "batch_size": 3},
    ):
        loaders = []
        for create in (training.create_dataloader_v1, ch02.create_dataloader_v1):
            torch.manual_seed(5)
            loaders.append(list(create(TEXT, **options)))
        assert len(loaders[0]) == len(loaders[1]) > 3
        for ours, theirs in zip(*loaders, strict=True):
            assert all(torch.equal(*both) for both in zip(ours, theirs, strict=True))
    assert len(training.GPTDatasetV1("too short", encoding, 8, 8)) == 0


def test_a_sample_owns_its_memory(encoding):
    dataset = training.GPTDatasetV1(TEXT, encoding, 8, 2)
    before = [(x.clone(), y.clone()) for x, y in dataset]
    assert len(before) == len(dataset) > 10
    for x, y in dataset:
        y[:3] = -100
        x[-2:] = 7
    dataset.input_ids[1][:] = 7
    dataset.target_ids[2:4][0][:] = 7
    for (x, y), (right_x, right_y) in zip(dataset, before, strict=True):
        assert torch.equal(x, right_x)
        assert torch.equal(y, right_y)
    assert torch.equal(dataset.input_ids[-1], before[-1][0])
    assert [len(w) for w in dataset.target_ids[::5]] == [8] * len(before[::5])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_dataset_holds_its_tokens_once(encoding):
    dataset = training.GPTDatasetV1(TEXT * 20, encoding, 64, 16)
    tokens = 8 * len(encoding.encode(TEXT * 20))
    pickled = pickle.dumps(dataset)
    assert tokens < len(pickled) < tokens + 4000
    copy = pickle.loads(pickled)
    assert len(copy) == len(dataset)
    for one, other in zip(copy[3], dataset[3], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("count", [1, 3])
def test_a_steps_inputs_and_targets_are_two_tensors(count):
    ids = torch.arange(200)
    windows = Windows(ids, 16, 0.3, seed=1)
    for inputs, targets in (windows.train(0, count), windows.validation(range(count))):
        right = inputs.clone()
        assert torch.equal(targets, right + 1)
        targets[:] = -100
        assert torch.equal(inputs, right)
    assert torch.equal(ids, torch.arange(200))


def test_ids_beyond_the_encoding_are_shown_as_unknown(encoding):
    ids = torch.tensor([[15496, 50257, 11, 50303]])
    assert training.token_ids_to_text(ids, encoding) == "Hello\ufffd,\ufffd"
    assert training.token_ids_to_text(ids[0, :1], encoding) == "Hello"

    class Letters:
        def decode(self, ids):
            return "".join({0: "a"}[i] for i in ids)

    with pytest.raises(KeyError):
        training.token_ids_to_text(torch.tensor([0, 1]), Letters())


def test_a_sample_of_a_padded_vocabulary_from_an_empty_start(encoding, capsys):
    model = fastgpt.GPTModel(CONFIG | {"vocab_size": 50304})
    with torch.no_grad():
        model.final_norm.shift.fill_(1.0)
        model.final_norm.scale.zero_()
        model.out_head.weight[50300] = 9.0
    training.generate_and_print_sample(model, encoding, "cpu", "")
    assert capsys.readouterr().out == "<|endoftext|>" + 50 * "\ufffd" + "\n"
    assert model.training


def test_text_and_ids(encoding):
    assert training.text_to_token_ids("", encoding).dtype is torch.int64
    ch05 = pytest.importorskip("llms_from_scratch.ch05")
    text = "Café <|endoftext|> 猫"
    ids = training.text_to_token_ids(text, encoding)
    assert torch.equal(ids, ch05.text_to_token_ids(text, encoding))
    assert training.token_ids_to_text(ids, encoding) == text
    assert training.token_ids_to_text(ids[0], encoding) == text


def test_train_model_simple_is_the_books(encoding, capsys):
    ch05 = pytest.importorskip("llms_from_scratch.ch05")
    book = pytest.importorskip("llms_from_scratch.ch04")
    cfg = CONFIG | {"vocab_size": 50257, "emb_dim": 8, "drop_rate": 0.0}
    results = []
    for model_class, module in ((book.GPTModel, ch05), (fastgpt.GPTModel, training)):
        torch.manual_seed(123)
        model = model_class(cfg)
        loaders = [training.create_dataloader_v1(TEXT, 4, 16, 16) for _ in range(2)]
        results.append(
            module.train_model_simple(
                model, *loaders, torch.optim.AdamW(model.parameters(), lr=1e-3), "cpu",
                num_epochs=2, eval_freq=2, eval_iter=1, start_context="Every", tokenizer=encoding,
            )
        )  # fmt: skip
        assert model.training
        results[-1] += (capsys.readouterr().out,)
    theirs, ours = results
    for mine, right in zip(ours[:2], theirs[:2], strict=True):
        assert mine == pytest.approx(right, rel=1e-4)
        assert len(mine) > 3
    assert ours[2] == theirs[2]
    shape = [line.partition(":")[0] for line in theirs[3].splitlines() if line.startswith("Ep ")]
    assert [n.partition(":")[0] for n in ours[3].splitlines() if n.startswith("Ep ")] == shape
    assert ours[3].count("Every") == theirs[3].count("Every") == 2


def test_losses_of_a_loader():
    model = fastgpt.GPTModel(CONFIG | {"drop_rate": 0.0})
    batches = [torch.randint(256, (2, 2, 9)) for _ in range(3)]
    loader = [(idx, targets) for idx, targets in batches]
    single = [training.calc_loss_batch(*batch, model, "cpu").item() for batch in loader]
    assert training.calc_loss_loader(loader, model, "cpu") == pytest.approx(sum(single) / 3)
    assert training.calc_loss_loader(loader, model, "cpu", 2) == pytest.approx(sum(single[:2]) / 2)
    assert training.calc_loss_loader(loader, model, "cpu", 9) == pytest.approx(sum(single) / 3)
    assert math.isnan(training.calc_loss_loader([], model, "cpu"))
    both = training.evaluate_model(model.eval(), loader, loader[:1], "cpu", 3)
    assert both == pytest.approx((sum(single) / 3, single[0]))
    assert model.training


def test_a_watched_model_is_called():
    model = fastgpt.GPTModel(CONFIG)
    seen = []
    model.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    idx = torch.randint(256, (2, 9))
    training.calc_loss_batch(idx, idx, model, "cpu").backward()
    assert seen == [(2, 9, 256)]
    other = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11))
    assert training.calc_loss_batch(idx % 11, idx % 11, other, "cpu").requires_grad


def test_pieces_have_the_tokens_of_the_whole(encoding, tmp_path, monkeypatch):
    text = TEXT + "a<|endoftext|>b \t \x1c x\u3000y\u00a0z 12 3's\n" * 3 + " end"
    whole = encoding.encode(text, allowed_special="all")
    for size in (3, 10, 64):
        cut = list(tokens.pieces(io.StringIO(text), tmp_path, size))
        assert "".join(cut) == text
        assert len(cut) > 5
        pieces = [encoding.encode(piece, allowed_special="all") for piece in cut]
        assert list(itertools.chain.from_iterable(pieces)) == whole
    monkeypatch.setattr(tokens, "LONGEST", 5000)
    assert max(map(len, tokens.pieces(io.StringIO("x" * 50_000), tmp_path, 1000))) == 6000


def test_token_files_are_made_once(encoding, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for name, text in (("b.txt", TEXT), ("sub/a.txt", "second\r\n"), ("sub/c.md", "no")):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    found = tokens.text_files([tmp_path / "b.txt", tmp_path / "sub"])
    assert [path.name for path in found] == ["b.txt", "a.txt"]
    seen, cut, pieces = [], [], tokens.pieces

    def small(text, path):
        for piece in pieces(text, path, 50):
            cut.append(piece)
            yield piece

    monkeypatch.setattr(tokens, "pieces", small)
    made = tokens.tokenise(found, tmp_path / "t", encoding, lambda *at: seen.append(at))
    assert len(cut) > 10
    text = f"{TEXT}<|endoftext|>second\n"
    assert made.ids().tolist() == encoding.encode(text, allowed_special="all")
    assert made.ids().dtype == torch.uint16
    assert made.largest == int(made.ids().long().max())
    assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in found)

    monkeypatch.setattr(tokens, "_write", None)
    assert tokens.tokenise(found, tmp_path / "t", encoding) == made
    monkeypatch.undo()
    made.path.with_suffix(".json").unlink()  # never finished
    assert tokens.tokenise(found, tmp_path / "t", encoding) == made
    made.path.write_bytes(b"")
    assert tokens.open_tokens(made.path) is None
    (tmp_path / "b.txt").write_text("another")
    assert tokens.tokenise(found, tmp_path / "t", encoding).digest != made.digest


def test_bad_texts_leave_nothing(encoding, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine\n" * 3 + b"not \xff fine")
    with pytest.raises(tokens.TextError, match=r"bad.txt is not UTF-8 text: byte 0xff"):
        tokens.tokenise([bad], tmp_path / "t", encoding)
    assert list((tmp_path / "t").iterdir()) == []
    bad.write_bytes(b"")
    for text, message in ((bad, "is empty"), ("gone", "no such file"), (tmp_path / "t", "no .txt")):
        with pytest.raises(tokens.TextError, match=message):
            tokens.text_files([text])


def test_windows():
    ids = torch.arange(1000).to(torch.uint16)
    windows = Windows(ids, 10, 0.2, seed=3)
    assert (windows.train_size, windows.validation_size) == (79, 19)
    idx, targets = windows.train(0, 2 * 79)
    assert torch.equal(targets, idx + 1)
    for epoch in idx.split(79):
        assert epoch[:, 0].sort().values.tolist() == list(range(0, 790, 10))
    assert not torch.equal(idx[:79], idx[79:])
    assert not torch.equal(idx[:79], Windows(ids, 10, 0.2, seed=4).train(0, 79)[0])
    assert torch.equal(windows.train(70, 20)[0], idx[70:90])
    held_out = windows.validation(range(19))[0]
    assert int(idx.max()) < int(held_out.min())
    assert windows.validation_sample(4) == [0, 4, 9, 14]
    assert windows.validation_sample(99) == list(range(19))
    Windows(ids[:22], 10, 0.1, 0)
    with pytest.raises(tokens.TextError, match="21 tokens, too short for a context of 10"):
        Windows(ids[:21], 10, 0.1, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1000])
def test_an_epoch_is_a_permutation(size):
    order, other = (
        Windows(torch.arange(size + 3), 1, 1e-9, seed).train(0, size)[0].flatten().tolist()
        for seed in (7, 8)
    )
    assert sorted(order) == list(range(size))
    if size > 60:
        assert order != other
        near = sum(abs(a - b) == 1 for a, b in itertools.pairwise(order))
        assert near < size / 8


def test_schedule():
    settings = Settings(steps=50, lr=1e-2, min_lr=1e-3, warmup=4)
    rates = [lr_factor(settings, step) for step in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert rates[27] == pytest.approx(0.55, abs=0.02)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_settings_and_configs(tmp_path):
    with pytest.raises(SettingsError, match="batch 0"):
        Settings(steps=1, batch=0)
    with pytest.raises(SettingsError, match="min_lr"):
        Settings(steps=1, lr=1e-3, min_lr=1e-2)
    assert read_config("1558M")["n_layers"] == 48
    with pytest.raises(SettingsError, match="warmup -1 is below 0"):
        Settings(steps=1, warmup=-1)
    for text, message in (
        ("{", "Expecting"),
        ('{"emb_dim": 4}', "lacks vocab_size"),
        (
            json.dumps(CONFIG | {"emb_dim": "32"}),
            "emb_dim '32' is not a whole number",
        ),
        (json.dumps(CONFIG | {"n_layers": -1}), "n_layers -1 is not a whole number of at least 0"),
        (json.dumps(CONFIG | {"drop_rate": 7}), "drop_rate 7 is not a number from 0 to 1"),
    ):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(SettingsError, match=message):
            read_config(str(tmp_path / "c.json"))
    with pytest.raises(SettingsError, match="neither one of 124M"):
        read_config("125M")


def killed_by_itself():
    """The process dies where a checkpoint is all written, and not yet in its place."""
    atomic_files.sync_folder = lambda folder: (
        os.kill(os.getpid(), signal.SIGKILL) if "step-00000004" in folder.name else None
    )


def waits_after_six_steps():
    one_step = trainer.Trainer._one_step

    def step_or_wait(self):
        if self.step == 6:
            time.sleep(300)
        return one_step(self)

    trainer.Trainer._one_step = step_or_wait


def test_killed_runs_resume_exactly(inputs):
    more = ("--steps", "14", "--checkpoint-every", "4", "--micro-batch", "4")
    right = trained(inputs, inputs / "right", *more)
    assert [step for step, (_, v) in enumerate(right, 1) if v == v] == [4, 8, 12, 14]
    assert (inputs / "right" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in checkpoint.checkpoints(inputs / "right")] == [
        "step-00000012",
        "step-00000014",
    ]

    out = inputs / "killed"
    run = Run(inputs, train_arguments(inputs, out, *more), before=killed_by_itself)
    assert run.codes() == [-signal.SIGKILL]
    assert checkpoint.checkpoints(out) == []
    assert list((out / "checkpoints").iterdir()) != []

    run = Run(inputs, train_arguments(inputs, out, *more), before=waits_after_six_steps)
    run.wait_for(lambda: steps_done(out) == 6)
    run.processes[0].kill()
    assert run.codes() == [-signal.SIGKILL]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]
    assert str(trained(inputs, out, *more, "--resume")) == str(right)
    (out / "model.safetensors").unlink()  # as where the last step's process is killed in between
    assert str(trained(inputs, out, "--resume")) == str(right)  # nothing is left to do
    for name in ("model.safetensors", "checkpoints/step-00000014/model.safetensors"):
        assert (out / name).read_bytes() == (inputs / "right" / name).read_bytes()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="maps are listed on Linux")
def test_a_resumed_run_holds_no_file_of_its_checkpoint(inputs, monkeypatch):
    out = inputs / "run"
    assert cli.main(train_arguments(inputs, out, "--steps", "1")) == 0
    mapped = []

    def run(self):
        with open("/proc/self/maps") as maps:
            mapped.extend(line for line in maps if "optimizer.pt" in line)
        return True

    monkeypatch.setattr(trainer.Trainer, "run", run)
    assert cli.main(["train", "--out", str(out), "--resume", "--steps", "2"]) == 0
    assert mapped == []


def test_a_checkpoint_that_cannot_be_removed_ends_no_run(inputs, monkeypatch):
    rmtree = shutil.rmtree

    def busy(path, ignore_errors=False):
        if "unfinished-step" in path.name:
            raise PermissionError(f"{path} is open")
        rmtree(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", busy)
    out, more = inputs / "run", ("--steps", "4", "--checkpoint-every", "1", "--keep", "1")
    assert cli.main(train_arguments(inputs, out, *more)) == 0
    assert [path.name for path in checkpoint.checkpoints(out)] == ["step-00000004"]
    monkeypatch.undo()
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]


def test_an_interrupt_saves_and_stops(inputs):
    out = inputs / "run"
    run = Run(inputs, train_arguments(inputs, out, "--steps", "5000", "--checkpoint-every", "5000"))
    run.wait_for(lambda: steps_done(out) >= 2)
    os.kill(run.processes[0].pid, signal.SIGINT)
    assert run.codes() == [130]
    (saved,) = checkpoint.checkpoints(out)
    step = checkpoint.load_step(saved)
    assert step == steps_done(out) < 5000
    assert f"stopped at step {step}; --resume continues from there" in run.said()


def test_a_loss_that_is_no_number_ends_the_run(inputs):
    more = ("--steps", "40", "--lr", "1e9", "--clip", "0", "--warmup", "0")
    run = Run(inputs, train_arguments(inputs, inputs / "run", *more))
    assert run.codes() == [1]
    assert "try a smaller --lr; there is no checkpoint yet" in run.said()


def test_gradients_that_are_no_numbers_are_not_saved(inputs, capsys, monkeypatch):
    gradients = trainer.Trainer._gradients

    def spoilt(self):
        loss = gradients(self)
        if self.step == 3:
            next(self.model.parameters()).grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(trainer.Trainer, "_gradients", spoilt)
    out = inputs / "run"
    arguments = train_arguments(inputs, out, "--steps", "4", "--checkpoint-every", "2")
    assert cli.main(arguments) == 1
    assert (
        "norm is inf at step 4: try a smaller --lr; --resume continues from step-00000002"
        in capsys.readouterr().err
    )
    assert [path.name for path in checkpoint.checkpoints(out)] == ["step-00000002"]
    assert all(p.isfinite().all() for p in load_model(out).parameters())


@pytest.mark.parametrize("spoilt_at", [1, 5, None])
def test_steps_that_are_read_late_are_the_same(inputs, capsys, monkeypatch, spoilt_at):
    """As on a GPU: the numbers of a step are read when the next one is queued."""
    gradients, one_step = trainer.Trainer._gradients, trainer.Trainer._one_step
    found, counts = [], []

    def spoilt(self):
        loss = gradients(self)
        if self.step + 1 == spoilt_at:
            next(self.model.parameters()).grad[0, 0] = math.inf
        return loss

    def counted(self):
        rows, stops = one_step(self)
        counts.append(len(rows))
        return rows, stops

    monkeypatch.setattr(trainer.Trainer, "_gradients", spoilt)
    monkeypatch.setattr(trainer.Trainer, "_one_step", counted)
    for out in (inputs / "at once", inputs / "late"):
        counts.clear()
        more = ("--steps", "7", "--checkpoint-every", "4", "--eval-every", "7")
        code = cli.main(train_arguments(inputs, out, *more))
        said = capsys.readouterr().err.partition("norm is inf")[2]
        saved = [path.name for path in checkpoint.checkpoints(out)]
        found.append((code, losses(out), said, saved))
        queue_of(monkeypatch)
    assert repr(found[0]) == repr(found[1])
    assert found[0][0] == (spoilt_at is not None)
    # Before the checkpoint of step 4 and after the last step nothing is left to read.
    assert counts == {1: [0], 5: [0, 1, 1, 2, 0], None: [0, 1, 1, 2, 0, 1, 2]}[spoilt_at]


def test_the_model_learns_and_loads_again(inputs, encoding):
    text = "".join(chr(97 + number % 8) + "\n" for number in range(2000))
    (inputs / "text.txt").write_text(text)
    out = inputs / "run"
    trained(inputs, out, "--steps", "60", "--lr", "3e-3", "--epochs", "9", "--seed", "1")
    model = load_model(out).eval()
    prompt = torch.tensor([encoding.encode("a\nb\n")])
    ids = fastgpt.generate_text_simple(model, prompt, 8, 16)
    assert encoding.decode(ids[0].tolist()) == "a\nb\nc\nd\ne\nf\n"
    assert losses(out)[-1][1] < 0.5


def test_a_tied_head_stays_tied(tmp_path):
    model = fastgpt.GPTModel(CONFIG)
    model.out_head.weight = model.tok_emb.weight
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.out_head.weight is again.tok_emb.weight
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(SettingsError, match=r"model.safetensors cannot be read"):
        load_model(tmp_path)


def test_a_full_disk_ends_a_run_with_what_it_had(inputs, capsys, monkeypatch):
    out = inputs / "run"
    assert cli.main(train_arguments(inputs, out, "--steps", "2")) == 0

    def full(*args):
        raise RuntimeError("unexpected pos 64 vs 0")  # PyTorch's way to say so

    monkeypatch.setattr(torch, "save", full)
    assert cli.main(["train", "--out", str(out), "--resume", "--steps", "4"]) == 1
    said = capsys.readouterr().err
    assert "step-00000004 can't be written (" in said
    assert "MB free): unexpected pos" in said
    assert "--resume continues from step-00000002" in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_the_optimisers_file_passes(monkeypatch, tmp_path, error):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(error):
        checkpoint.load_optimizer(tmp_path, nn.Linear(1, 1), None, None)
