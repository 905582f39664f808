"""`fastgpt compare`: exit codes, the JSON document, and what happens where something is missing."""

import functools
import json
import subprocess
import sys
import threading

import pytest
import torch

import fastgpt
from fastgpt import GPT_CONFIG_124M, GPTModel, cli
from fastgpt.bench import compare, rounds, workloads
from fastgpt.bench.formatting import UNTRUSTED
from fastgpt.cli import compare as command
from fastgpt.tokenizer import EncodingError, gpt2_encoding

# The vocabulary stays whole: the prompt's ids are GPT-2's.
SMALL = GPT_CONFIG_124M | {"context_length": 32, "emb_dim": 32, "n_heads": 2, "n_layers": 1}

compare_small = functools.partial(compare.compare, cfg=SMALL, lengths=(8, 32), new_tokens=4)


@pytest.fixture
def small(monkeypatch):
    """The command on a small model and without tiktoken; it may set the number of threads."""

    def unavailable():
        raise EncodingError("not in this test")

    monkeypatch.setattr(command, "gpt2_encoding", unavailable)
    monkeypatch.setattr(command, "compare", compare_small)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def neighbour(monkeypatch):
    """What other programs are said to do to the measurement; at first, nothing."""
    said = {"load": None, "seconds": None}
    monkeypatch.setattr(rounds, "doubt_of_load", lambda others: said["load"])
    monkeypatch.setattr(rounds, "doubt_of_seconds", lambda seconds: said["seconds"])
    return said


def broken(factor):
    class Broken(GPTModel):
        def forward(self, idx):
            return super().forward(idx) * factor

    return Broken


def without_table(monkeypatch, tmp_path, fetch):
    """tiktoken with an empty cache and `fetch` in place of the download."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", fetch)


def refuse(path):
    raise ConnectionError(f"no way to {path}")


@pytest.mark.usefixtures("small", "neighbour")
def test_table(capsys):
    assert cli.main(["compare", "--rounds", "2", "--threads", "1"]) == 0
    note, *table = capsys.readouterr().out.splitlines()
    assert "known ids" in note
    if "No fused kernels" in table[0]:
        del table[0]
    text = "\n".join(table)
    for part in ("forward [1, 8]", "forward [1, 32]", "4/4 same", "1 thread,", torch.__version__):
        assert part in text
    assert text.count("yes") == 3
    assert max(map(len, table[:-2])) <= 80


@pytest.mark.usefixtures("small")
def test_json(capsys):
    assert cli.main(["compare", "--json", "--rounds", "1", "--seed", "7"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert "known ids" in err
    assert document["agree"] is True
    assert document["seed"] == 7
    assert document["prompt"] == {
        "text": "The cat sat",
        "ids": [464, 3797, 3332],
        "from": "known ids",
    }
    assert {"backend", "isa", "threads", "fastgpt", "torch", "python", "cpu"} <= set(
        document["machine"]
    )
    forward, _, greedy = document["rows"]
    assert forward["work"] == "forward [1, 8]"
    assert 0 < forward["max_abs_difference"] <= forward["tolerance"]
    assert forward["speed_up"] == pytest.approx(
        forward["reference_seconds"] / forward["fastgpt_seconds"]
    )
    assert forward["fastgpt_tokens_per_second"] == pytest.approx(8 / forward["fastgpt_seconds"])
    assert greedy["same_tokens"] == greedy["tokens"] == 4


def test_agrees_on_every_path(path):
    assert all(row["agree"] for row in compare_small(rounds=1))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("factor", [1.001, torch.nan, torch.inf])
def test_disagreement_exits_with_1(monkeypatch, capsys, factor):
    monkeypatch.setattr(workloads, "GPTModel", broken(factor))
    assert cli.main(["compare", "--json", "--rounds", "1"]) == 1
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document["agree"] is False
    assert document["rows"][0]["agree"] is False
    assert cli.main(["compare", "--rounds", "1"]) == 1
    assert "NO" in capsys.readouterr().out


def test_greedy_tokens_may_part_only_at_a_tie():
    def book(ids):
        return torch.tensor([0.0, 1.0, 1.0 - 1e-6]).expand(*ids.shape, 3)

    theirs = torch.tensor([[0, 0, 1, 1]])
    tie, mistake = torch.tensor([[0, 0, 2, 0]]), torch.tensor([[0, 0, 0, 1]])
    assert compare._same_tokens(book, theirs, theirs, 2, 1e-6) == (2, True)
    assert compare._same_tokens(book, theirs, tie, 2, 1e-6) == (0, True)
    assert compare._same_tokens(book, theirs, mistake, 2, 1e-6) == (0, False)


@pytest.mark.parametrize("busy", [None, "very busy"])
def test_progress_counts_every_step(neighbour, busy):
    neighbour["load"] = busy
    seen = []
    compare_small(rounds=2, progress=lambda done, total, doing: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(len(seen)))
    totals = [total for _, total in seen]
    assert totals == sorted(totals)
    assert totals[0] == 11
    assert totals[-1] == len(seen) - 1 == (11 if busy is None else 11 + 3 * 3 * 2)


@pytest.mark.usefixtures("small")
def test_a_busy_machine_is_said(neighbour, capsys):
    assert cli.main(["compare", "--rounds", "2"]) == 0
    assert "?" not in capsys.readouterr().out
    neighbour["seconds"] = "all over the place"
    assert cli.main(["compare", "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("x ?") == 3
    assert UNTRUSTED in out
    reasons = "reference: all over the place; fastgpt: all over the place"
    assert f"forward [1, 8]: {reasons}" in out
    neighbour["load"] = "very busy"  # which is reason enough
    assert cli.main(["compare", "--json", "--rounds", "2"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["doubt"], row["rounds"]) for row in rows] == [("very busy", 8)] * 3


@pytest.mark.usefixtures("small")
def test_missing_extension_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(fastgpt.cpu, "missing_reason", lambda: "no compiler")
    assert cli.main(["compare", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "no compiler" in line] == [
        "No fused kernels, PyTorch's own operations stand in: no compiler"
    ]
    assert "backend reference, " in out


@pytest.mark.usefixtures("small")
def test_missing_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    assert cli.main(["compare"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "pip install rich" in message
    assert cli.main(["compare", "--json", "--rounds", "1"]) == 0


def test_tiktoken_without_its_table(monkeypatch, tmp_path, capsys):
    without_table(monkeypatch, tmp_path, refuse)
    monkeypatch.setattr(command, "compare", lambda prompt, **options: [])
    assert cli.main(["compare", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["prompt"]["ids"] == list(compare.PROMPT_IDS)
    (line,) = (line for line in err.splitlines() if "gpt2 table" in line)
    assert "ConnectionError" in line


def test_tiktoken_with_its_table():
    try:
        encoding = gpt2_encoding()
    except EncodingError as error:
        pytest.skip(f"no table here: {error}")
    assert tuple(encoding.encode(compare.PROMPT)) == compare.PROMPT_IDS


def test_a_download_that_hangs_is_given_up(monkeypatch, tmp_path):
    network = threading.Event()

    def hang(path):
        network.wait(30)
        refuse(path)

    without_table(monkeypatch, tmp_path, hang)
    with pytest.raises(EncodingError, match=r"no answer within .* TIKTOKEN_CACHE_DIR"):
        gpt2_encoding(timeout=0.05)
    network.set()


@pytest.mark.parametrize(
    "arguments", [[], ["compare", "--rounds", "0"], ["compare", "--backend", "gpu"], ["cmp"]]
)
def test_bad_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "usage: fastgpt" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_a_backend_that_cannot_run_exits_with_2(monkeypatch, capsys):
    assert cli.main(["compare", "--json", "--backend", "triton"]) == 2
    assert "backend 'triton' cannot run here" in capsys.readouterr().err
    monkeypatch.setenv("FASTGPT_BACKEND", "gpu")
    assert cli.main(["compare", "--json"]) == 2
    assert "unknown backend 'gpu'" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_interrupt_exits_quietly(monkeypatch, capsys):
    def interrupted(prompt, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "compare", interrupted)
    assert cli.main(["compare", "--json"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_module_runs_as_a_command():
    command = [sys.executable, "-m", "fastgpt", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"fastgpt {fastgpt.__version__}\n"
