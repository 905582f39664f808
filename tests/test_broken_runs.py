"""What a run of `fastgpt train` says of its own files where something has damaged them."""

import json
import os
import pickle
import shutil
import sys

import pytest
from forked import Server
from runs import losses, needs_table, train_arguments, write_inputs

from fastgpt import cli

DEEP = "[" * 200_000


class Hostile:
    """Unpickled, it would write a file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    needs_table()
    inputs = write_inputs(tmp_path_factory.mktemp("trained"), letters=600)
    assert cli.main(train_arguments(inputs, inputs / "run", "--steps", "2")) == 0
    return inputs / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, with its own tokens."""
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    facts = out / "run.json"
    facts.write_text(facts.read_text().replace(str(trained), str(out)))
    return out


def resume(out, *texts):
    return cli.main(["train", *texts, "--out", str(out), "--resume", "--steps", "3"])


def contents(out):
    files = [path for path in out.rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def the_only(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


def changed(**fields):
    return lambda text: json.dumps(json.loads(text) | fields)


@pytest.mark.parametrize(
    ("pattern", "change", "message"),
    [
        ("run.json", lambda text: text[:50], "run.json is broken"),
        ("run.json", lambda text: DEEP, "run.json is broken"),
        ("run.json", lambda text: "[]", "run.json is broken"),
        ("run.json", changed(config={}), "run.json is broken"),
        ("run.json", changed(settings={"stepps": 3}), "run.json is broken"),
        ("run.json", changed(start=3), "run.json is broken: start 3 is not a name"),
        ("run.json", changed(tokens=5), "run.json is broken: tokens and digest are not text"),
        ("log.csv", lambda text: "a,b\n1,2\n", "log.csv is broken: its columns are a, b"),
        ("log.csv", lambda text: text.replace(",", ",x", 12), "log.csv is broken"),
        ("checkpoints/*/state.json", lambda text: "[]", "is not a complete checkpoint"),
        ("checkpoints/*/state.json", changed(step=-1), "is not a complete checkpoint"),
        ("checkpoints/*/state.json", lambda text: DEEP, "is not a complete checkpoint"),
        ("checkpoints/*/optimizer.pt", lambda text: "", "optimizer.pt can't be loaded"),
        ("checkpoints/*/optimizer.pt", lambda text: "no", "optimizer.pt can't be loaded"),
        ("checkpoints/*/model.safetensors", lambda text: "no", "model.safetensors cannot be read"),
    ],
)
def test_one_line_names_the_file(run, capsys, pattern, change, message):
    path = the_only(run, pattern)
    content = path.read_bytes()
    path.write_text(change(content.decode("utf-8", "replace")))
    before = contents(run)
    assert resume(run) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert "Traceback" not in "".join(said)
    assert contents(run) == before
    path.write_bytes(content)
    assert resume(run) == 0
    assert len(losses(run)) == 3


@pytest.fixture(scope="module")
def forked():
    server = Server("fastgpt.cli", "fastgpt.training.run_setup", "fuzz.readers")
    yield server
    server.close()


@pytest.mark.skipif(sys.platform != "linux", reason="has the pipes and devices of Linux")
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
def test_what_has_no_end_is_not_read(run, forked, kind):
    saved = [f"checkpoints/*/{name}" for name in ("state.json", "optimizer.pt", "config.json")]
    saved += ["checkpoints/*/model.safetensors", "tokens/*.json", "tokens/*.bin"]
    for pattern in ("run.json", "log.csv", *saved):
        path = the_only(run, pattern)
        aside = path.rename(run / "aside")
        if kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        arguments = ["train", "--out", str(run), "--resume", "--steps", "3"]
        outcome = forked.call("fuzz.readers", "command", arguments, seconds=30)
        assert (outcome.code, outcome.value) == (0, 2), (pattern, outcome)
        assert "Traceback" not in outcome.said, (pattern, outcome)
        path.rmdir() if kind == "a folder" else path.unlink()
        aside.rename(path)
    assert resume(run) == 0


def test_a_pickle_that_runs_something_does_not(run, capsys, tmp_path):
    path = the_only(run, "checkpoints/*/optimizer.pt")
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "mark")))
    assert resume(run) == 2
    assert "optimizer.pt can't be loaded" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


def test_changed_tokens_are_not_trained_on(run, trained, capsys):
    path = the_only(run, "tokens/*.bin")
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert resume(run) == 2
    assert "is missing or damaged: give the texts again" in capsys.readouterr().err
    assert resume(run, str(trained.parent / "text.txt")) == 0
    assert path.read_bytes() == content
