"""Several processes against one with the same global batch, on gloo; and processes that die."""

import json
import os
import signal

import pytest
import torch
from runs import Run, losses, needs_table, steps_done, train_arguments, trained, write_inputs

import fastgpt
from fastgpt.training.settings import load_model

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)
fully_sharded = pytest.mark.skipif(
    torch.__version__ < "2.6", reason="FSDP2 is public since torch 2.6"
)
# One window at a time, so that dropout falls alike on the same windows whoever takes them.
SAME = ("--checkpoint-every", "3", "--micro-batch", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    needs_table()
    return write_inputs(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def alone(folder):
    return trained(folder, folder / "alone", "--steps", "9", *SAME)


def assert_same(mine, right):
    assert len(mine) == len(right)
    for ours, theirs in zip(mine, right, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4, nan_ok=True)


@pytest.mark.parametrize(
    ("size", "options"), [(2, ()), (3, ()), pytest.param(2, ("--fsdp",), marks=fully_sharded)]
)
def test_the_losses_of_one_process(folder, alone, size, options):
    out = folder / f"{size}{''.join(options)}"
    sample = ("--sample", "a\nb", "--sample-tokens", "2")
    run = Run(folder, train_arguments(folder, out, "--steps", "9", *SAME, *sample, *options), size)
    assert run.codes() == [0] * size, run.said()
    assert run.said().count("\n  a b") == 3  # the first process alone speaks
    assert "Warning" not in run.said()
    assert_same(losses(out), alone)
    mine, right = load_model(out), load_model(folder / "alone")
    for ours, theirs in zip(mine.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=0)


@fully_sharded
def test_checkpoints_move_between_numbers_of_processes(folder, alone):
    out = folder / "moved"
    for steps, size, options in (("3", 3, ("--fsdp",)), ("6", 2, ()), ("9", 2, ("--fsdp",))):
        # The schedule of nine steps from the start, but no further than this.
        run = Run(
            folder,
            train_arguments(folder, out, "--steps", "9", *SAME, "--resume", *options),
            size,
            before=globals()[f"stops_after_{steps}"] if steps != "9" else None,
        )
        assert run.codes() == [0 if steps == "9" else 130] * size, run.said()
        assert steps_done(out) == int(steps)
    assert_same(losses(out), alone)


@fully_sharded
def test_shards_are_saved_as_the_model_they_are_of(folder):
    model = fastgpt.GPTModel(json.loads((folder / "config.json").read_text()))
    model.out_head.weight = model.tok_emb.weight
    model.drop_emb.p = 0.25
    for norm in (model.final_norm, *(n for b in model.trf_blocks for n in (b.norm1, b.norm2))):
        norm.eps = 1e-3
    model.save_pretrained(folder / "special")
    out = folder / "from-special"
    arguments = ["train", folder / "text.txt", "--out", out, "--from", folder / "special"]
    more = ["--fsdp", "--steps", "2", "--batch", "2", "--lr", "0"]
    run = Run(folder, list(map(str, arguments + more)), 2)
    assert run.codes() == [0, 0], run.said()
    again = load_model(out)
    assert again.out_head.weight is again.tok_emb.weight
    assert again.trf_blocks[1].norm2.eps == again.final_norm.eps == 1e-3
    assert (again.drop_emb.p, again.trf_blocks[0].drop_shortcut.p) == (0.25, 0.1)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def _stops_after(last):
    from fastgpt.training.trainer import Trainer

    one_step = Trainer._one_step

    def step(self):
        if self.step == last - 1 and self.group.rank == 0:
            self._stop.set()
        return one_step(self)

    Trainer._one_step = step


def stops_after_3():
    _stops_after(3)


def stops_after_6():
    _stops_after(6)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_lost_process_ends_the_run(folder, number):
    out = folder / f"lost{number}"
    more = ("--steps", "100000", "--checkpoint-every", "4", "--timeout", "3")
    run = Run(folder, train_arguments(folder, out, *more), 2)
    run.wait_for(lambda: steps_done(out) >= 6)
    os.kill(run.processes[1].pid, number)
    run.processes[0].join(60)
    assert run.processes[0].exitcode == 1, run.said()
    run.processes[1].kill()
    said = run.said()
    assert "process 0 lost contact with the others: " in said
    assert ".cc:" not in said
    assert "--resume continues from step-" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        (b"fine \xff", (), "is not UTF-8 text: byte 0xff"),
        (b"a\n" * 999, ("--batch", "5"), "a batch of 5 can't be divided evenly among 2 processes"),
    ],
)
def test_what_is_wrong_is_said_once(folder, tmp_path, text, more, message):
    write_inputs(tmp_path)
    (tmp_path / "text.txt").write_bytes(text)
    run = Run(tmp_path, train_arguments(tmp_path, tmp_path / "out", *more), 2)
    assert run.codes() == [2, 2]
    assert run.said().count("fastgpt train: ") == 1, run.said()
    assert message in run.said()
    assert not (tmp_path / "out" / "run.json").exists()


def breaks_the_second_process():
    from fastgpt.training import run_setup

    def broken(*args):
        raise run_setup.SettingsError("the model is broken here")

    if os.environ["RANK"] == "1":
        run_setup._model = broken


def test_what_is_wrong_with_another_process_is_said_by_it(folder):
    out = folder / "broken"
    arguments = train_arguments(folder, out, "--steps", "1", "--timeout", "5")
    run = Run(folder, arguments, 2, before=breaks_the_second_process)
    assert run.codes() == [1, 2]
    assert run.said().count("fastgpt train: the model is broken here") == 1, run.said()
