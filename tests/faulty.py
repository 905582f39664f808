"""Commands that are killed or have a disk that fails: what they say, and what they leave."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys

import pytest
from forked import HERE, Server
from runs import losses, needs_table, write_inputs

KILLED = 0  # in place of an error
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS}
MODULES = ("faulty", "fastgpt.cli", "fastgpt.training.run_setup", "matplotlib.figure", "jinja2")
MODULES += ("fastgpt.bench.charts", "fastgpt.bench.page", "safetensors.torch", "torch._dynamo")


def server(folder):
    """The process whose children can be armed; its library is compiled into the folder."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("a library that lets calls fail takes Linux and a C compiler")
    library = folder / "faults.so"
    source = HERE / "faults.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    before = os.environ.get("LD_PRELOAD")
    preload = f"{before} {library}" if before else str(library)
    return Server(*MODULES, LD_PRELOAD=preload)


def run_command(arguments, folder, nth, error):
    """In a child: runs the command; its exit code, and how many of its calls change the folder."""
    import torch

    from fastgpt import cli
    from fastgpt.training import trainer

    torch.set_num_threads(1)
    trainer.peak = lambda device, autocast: 1e12  # which takes longer than the training
    library = ctypes.CDLL(None)
    library.fault_arm(os.fsencode(folder), nth, error)
    code = cli.main(arguments)
    calls = library.fault_calls()
    library.fault_arm(b"", 0, 0)
    return code, calls


class Command:
    """A command, what it needs and what it makes.

    Args:
        folder: with a folder "inputs" made once, and a folder for each trial.
    """

    def __init__(self, folder, forked):
        self.folder, self.forked, self.trials = folder, forked, 0
        self.inputs = folder / "inputs"
        self.inputs.mkdir()
        self.prepare()
        place = self.place()
        outcome = self.run(place)
        assert (outcome.value or [1])[0] == 0, outcome.said
        self.calls = outcome.value[1]
        self.right = self.content(place)

    def place(self):
        """The folder of a new trial, as it is before the command."""
        self.trials += 1
        place = self.folder / f"trial-{self.trials}"
        place.mkdir()
        self.fill(place)
        return place

    def run(self, place, nth=0, error=KILLED):
        arguments = [str(argument) for argument in self.arguments(place)]
        return self.forked.call("faulty", "run_command", arguments, str(place), nth, error)

    def goes_on(self, place):
        """Runs the command once more, after which all is as if nothing had happened."""
        again = self.run(place)
        assert (again.value or [1])[0] == 0, again.said
        assert self.content(place) == self.right
        assert not leftovers(place), leftovers(place)
        shutil.rmtree(place)

    def killed(self, nth):
        place = self.place()
        outcome = self.run(place, nth)
        assert outcome.code == -9, (outcome.said, nth)
        self.check(place)
        self.goes_on(place)

    def fails(self, nth, error):
        """The command says so in a line, leaves nothing unfinished, and can be run again; whether
        it failed at all.
        """
        place = self.place()
        outcome = self.run(place, nth, error)
        assert outcome.code == 0, outcome.said
        said = [line for line in outcome.said.splitlines() if line.startswith("fastgpt ")]
        if outcome.value[0] != 0:
            assert outcome.value[0] in (1, 2), outcome.said
            assert len(said) == 1, outcome.said
            assert os.strerror(error) in said[0], outcome.said
        else:
            assert not said
        assert "Traceback" not in outcome.said
        if error == errno.ENOSPC:  # the others may keep the command from removing files
            assert not leftovers(place), (leftovers(place), outcome.said)
        self.check(place)
        self.goes_on(place)
        return outcome.value[0] != 0

    def prepare(self):
        """Makes the inputs."""

    def fill(self, place):
        """Makes what the command finds."""

    def check(self, place):
        """What the command left is what was there, or what it makes."""


def leftovers(place):
    return [str(path.relative_to(place)) for path in place.rglob(".*")]


class Train(Command):
    """A run that starts with texts, keeps one checkpoint, and evaluates and draws."""

    steps = 6

    def prepare(self):
        needs_table()
        write_inputs(self.inputs, 300, emb_dim=8, n_layers=1)

    def arguments(self, place):
        out = place / "run"
        yield from ("train", self.inputs / "text.txt", "--out", out, "--resume", "--keep", 1)
        yield from ("--config", self.inputs / "config.json", "--batch", 2, "--eval-every", 2)
        yield from ("--steps", self.steps, "--checkpoint-every", 2)

    def content(self, place):
        import torch

        out = place / "run"
        (saved,) = (out / "checkpoints").glob("step-*")
        assert saved.name == f"step-{self.steps:08d}"
        optimizer = torch.load(saved / "optimizer.pt", weights_only=True)
        state = [
            {name: t.tolist() for name, t in parameter.items()}
            for parameter in optimizer["state"].values()
        ]
        assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
        weights = [(folder / "model.safetensors").read_bytes() for folder in (out, saved)]
        tokens = [path.read_bytes() for path in (out / "tokens").glob("*.bin")]
        return str(losses(out)), weights, state, (out / "run.json").read_bytes()[:50], tokens

    def check(self, place):
        """The newest checkpoint, and what was made of it, can be read."""
        import json

        from fastgpt import GPTModel

        out = place / "run"
        for folder in sorted((out / "checkpoints").glob("step-*")):
            GPTModel.from_pretrained(folder)
            assert json.loads((folder / "state.json").read_text())["step"] == int(folder.name[5:])
        if (out / "model.safetensors").exists():
            GPTModel.from_pretrained(out)
        if (out / "run.json").exists():
            json.loads((out / "run.json").read_text())


class Quantise(Command):
    """Quantises a model into a new folder."""

    def prepare(self):
        import torch
        from runs import CONFIG

        import fastgpt

        torch.manual_seed(0)
        fastgpt.GPTModel(CONFIG | {"n_layers": 1}).save_pretrained(self.inputs / "model")

    def arguments(self, place):
        return ("quantize", self.inputs / "model", "--out", place / "out", "--precision", "int4")

    def content(self, place):
        return {path.name: path.read_bytes() for path in (place / "out").glob("[!.]*")}

    def check(self, place):
        assert self.content(place).items() <= self.right.items()

    def goes_on(self, place):
        if self.content(place) != self.right:  # else the command takes it for another model
            super().goes_on(place)


class Answer(Command):
    """Answers a file of prompts, with the first two answered before."""

    prompts = ("a", "bc\nd", "", "efg", "hh")

    def prepare(self):
        import json

        import torch
        from runs import CONFIG

        import fastgpt

        needs_table()
        torch.manual_seed(0)
        cfg = CONFIG | {"n_layers": 1, "vocab_size": 50257, "emb_dim": 8}
        fastgpt.GPTModel(cfg).save_pretrained(self.inputs / "model")
        lines = [json.dumps({"prompt": prompt}) for prompt in self.prompts]
        (self.inputs / "prompts.jsonl").write_text("\n".join(lines))

    def arguments(self, place):
        yield from ("generate", "--model", self.inputs / "model", "--max-new-tokens", 3)
        yield from ("--prompts", self.inputs / "prompts.jsonl", "--output", place / "out")
        yield from ("--batch", 2)

    def content(self, place):
        return {path.name: path.read_bytes() for path in place.iterdir()}

    def check(self, place):
        if (place / "out").exists() and hasattr(self, "right"):
            assert self.right["out"].startswith((place / "out").read_bytes())


class Report(Command):
    """Draws an earlier run's figures over a report."""

    def prepare(self):
        import json

        from reports import full_document

        document = full_document()
        document |= {"works": document["works"][:2], "agree": True}
        (self.inputs / "old.json").write_text(json.dumps(document))

    def arguments(self, place):
        return ("bench", "--from", self.inputs / "old.json", "--out", place / "report.html")

    def fill(self, place):
        (place / "report.html").write_text("an old page")
        (place / "report.json").write_text("{}")

    def content(self, place):
        return {path.name: path.read_bytes() for path in place.iterdir()}

    def check(self, place):
        found = self.content(place)
        assert found["report.html"] in (b"an old page", self.right["report.html"])
        assert found["report.json"] in (b"{}", self.right["report.json"])


COMMANDS = (Train, Quantise, Answer, Report)
