"""What the commands do where their output can't be written."""

import io
import os
import subprocess
import sys

import pytest

from fastgpt.cli.progress import measuring

COMMANDS = [["info"], ["info", "--json"], ["--help"], ["train", "--help"]]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="no such files and pipes on Windows")


def run(arguments, stdout, **environment):
    """Exit code, and what is said on stderr."""
    buffered = {k: v for k, v in os.environ.items() if not k.startswith("PYTHONUNBUFFERED")}
    done = subprocess.run(
        [sys.executable, "-m", "fastgpt", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=buffered | environment,
        timeout=120,
    )
    return done.returncode, done.stderr.decode()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_full_disk_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        code, said = run(arguments, full)
    assert code == 1
    assert said.startswith("fastgpt")
    assert said.endswith("output: No space left on device\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_pipe_that_nobody_reads_is_nothing_to_say(arguments):
    end, start = os.pipe()
    os.close(end)
    try:
        assert run(arguments, start) == (141, "")
    finally:
        os.close(start)


def test_a_closed_stream():
    command = f"{sys.executable} -m fastgpt info"
    for closed in (">&-", "2>&-"):
        done = subprocess.run(f"{command} {closed}", shell=True, capture_output=True, timeout=120)
        assert done.returncode == 0
        assert done.stderr == b""
        assert bool(done.stdout) == (closed == "2>&-")


def test_a_terminals_encoding_may_lack_everything():
    strange = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    strange |= {"PYTHONIOENCODING": "ascii", "FASTGPT_NAME": "猫"}
    assert run(["info"], subprocess.DEVNULL, **strange) == (0, "")


def test_what_is_printed_beside_a_bar_goes_to_stdout(capsys, monkeypatch):
    pytest.importorskip("rich")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with measuring(None) as (show, _):
        show(1, 2, "a step")
        print("a figure")
    assert capsys.readouterr().out.endswith("a figure\n")
    assert "1/2" in terminal.getvalue()
