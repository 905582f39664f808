"""Every example of docs/training.md runs, one after another in one folder, as a reader would."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from runs import needs_table

from fastgpt import cli

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_line(line):
    command = shlex.split(line)
    if command[0] == "fastgpt":
        assert cli.main(command[1:]) == 0, line
        return
    assert command[0] == "torchrun"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command[1:]],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(os.name == "nt", reason="torchrun has no libuv there")
def test_the_examples_of_the_training_page(tmp_path, monkeypatch, capsys):
    needs_table()
    monkeypatch.chdir(tmp_path)
    words = "Every effort moves you a little further.\n" * 120
    (tmp_path / "book.txt").write_text(words)
    (tmp_path / "prompts.txt").write_text("Every\nmoves you\n")
    blocks = BLOCKS.findall((ROOT / "docs" / "training.md").read_text())
    assert [kind for kind, _ in blocks] == ["sh"] * 4 + ["python"]
    for kind, text in blocks:
        if kind == "python":
            exec(text, {})
        else:
            for line in text.splitlines():
                run_line(line)
    assert capsys.readouterr().out.count('"prompt"') == 2
