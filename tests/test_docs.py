"""Every example of the README and of docs/ runs, a page's one after another in one folder, as a
reader would; and what the pages quote, name and measure is there.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from reports import full_document
from runs import needs_table

from benchmarks.figures import REGION, filled
from fastgpt import cli
from fastgpt.bench import rounds, rule, workloads
from fastgpt.training import settings

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = [
    "README.md",
    "docs/backends.md",
    "docs/benchmarks.md",
    "docs/platforms.md",
    "docs/quantization.md",
    "docs/readers.md",
    "docs/training.md",
]
QUOTING = {"docs/writing-a-kernel.md"}
WITHOUT = {"docs/cpu.md", "docs/reliability.md"}
ELSEWHERE = {"docs/weights.md"}  # in test_weights.py, with models of its own


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run_line(line):
    command = shlex.split(line, comments=True)
    if not command:
        return
    if command[0] == "fastgpt":
        assert cli.main(command[1:]) == 0, line
    elif command[0] == "make":
        assert re.search(rf"^([a-z ]* )?{command[1]}[ :]", (ROOT / "Makefile").read_text(), re.M)
    elif command[:2] == ["pip", "install"]:
        check_extras(command[2])
    else:
        assert command[0] == "torchrun", line
        torchrun(command[1:])


def check_extras(requirement):
    """Of a requirement like .[train], or of a package by its own name: it is one of the extras'."""
    text = (ROOT / "pyproject.toml").read_text()
    _, _, rest = text.partition("[project.optional-dependencies]")
    extras = re.findall(r"^(\w+) = \[", rest.partition("[project.scripts]")[0], re.MULTILINE)
    if not requirement.startswith("."):
        assert f'"{requirement}>=' in text
        return
    named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", requirement)
    assert named, requirement
    assert set((named[1] or "cli").split(",")) <= set(extras)


def torchrun(arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with a text and prompts; 124M is small to the command line, the bench tiny."""
    needs_table()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("Every effort moves you a little further.\n" * 120)
    (tmp_path / "prompts.txt").write_text("Every\nmoves you\n")
    monkeypatch.setitem(settings.CONFIGS, "124M", settings.CONFIGS["toy"])
    monkeypatch.setattr(workloads, "QUICK", workloads.QUICK[:1])
    monkeypatch.setattr(rounds, "ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(rule, "CONFIG", workloads.CONFIGS["toy"] | {"context_length": 128})


@pytest.mark.skipif(os.name == "nt", reason="torchrun has no libuv there")
@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", RUN)
def test_examples_run(page, capsys):
    blocks = BLOCKS.findall((ROOT / page).read_text(encoding="utf-8"))
    names = {}
    assert blocks
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, page, "exec"), names)
        else:
            assert kind == "sh"
            for line in text.splitlines():
                run_line(line)
    out = capsys.readouterr().out
    if page == "docs/training.md":
        assert out.count('"prompt"') == 2
    code = "".join(text for _, text in blocks)
    for line in re.findall(r"^# (?:.*\.\.\. )?\[?((?:\d+,? ?)+)\]?$", code, re.MULTILINE):
        promised, printed = (" ".join(re.findall(r"\d+", text)) for text in (line, out))
        assert promised in printed, f"{page} promises {line}"


def test_every_page_is_looked_at():
    names = {page.relative_to(ROOT).as_posix() for page in pages()}
    assert names == {*RUN, *QUOTING, *WITHOUT, *ELSEWHERE}
    for name in WITHOUT:
        assert not BLOCKS.search((ROOT / name).read_text(encoding="utf-8")), name


@pytest.mark.parametrize("page", sorted(QUOTING))
def test_what_is_quoted_is_the_real_code(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    quotes = 0
    for block in BLOCKS.finditer(text):
        source = re.findall(r"`([\w/.-]+\.\w+)`", text[: block.start()])[-1]
        code = (ROOT / source).read_text(encoding="utf-8")
        assert block[2] in code, f"{source} has no such lines:\n{block[2]}"
        quotes += 1
    assert quotes > 5


@pytest.mark.parametrize("page", [page.relative_to(ROOT).as_posix() for page in pages()])
def test_links_lead_somewhere(page):
    text = BLOCKS.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_readme_names_files_that_are_there():
    _, _, table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## To change X")
    paths = re.findall(r"`([\w/]+/[\w/.]*)`", table)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_environment_variable_is_in_the_table():
    listed = set(re.findall(r"`([A-Z_]+)`", (ROOT / "docs" / "backends.md").read_text()))
    read = re.compile(r"environ(?:\.get\(|\[)\s*\"([A-Z_]+)\"|\"([A-Z_]+)\" not in os\.environ")
    found = set()
    for folder in ("fastgpt", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= {a or b for a, b in read.findall(path.read_text(encoding="utf-8"))}
    found |= {a or b for a, b in read.findall((ROOT / "setup.py").read_text())}
    assert found >= {"FASTGPT_BACKEND", "FASTGPT_NO_EXT"}
    assert found - {"PYTHONPATH", "LD_PRELOAD"} <= listed


def test_figures_in_the_pages_are_those_of_the_last_measurement():
    document = ROOT / "docs" / "figures" / "bench.json"
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if document.exists():
            assert filled(text, json.loads(document.read_text())) == text, "make figures"
        elif path.name == "readers.md":
            kinds = [kind for _, kind, _ in REGION.findall(text)]
            assert kinds == ["forward", "decode", "train", "machine"]


def test_figures_are_written_between_their_marks():
    page = "a\n<!-- figures: train -->\nold\n<!-- end of figures -->\nb\n"
    new = filled(page, full_document())
    assert new.startswith("a\n<!-- figures: train -->\n| ")
    assert new.endswith("<!-- end of figures -->\nb\n")
    assert "old" not in new
    assert "|  | train GPT-2 124M [2, 256] | train GPT-2 124M [2, 512] |" in new
    assert "\n| the book | 1.00 s (1.0e-06) | 1.00 s (1.0e-06) |" in new
    assert "KL" not in new
    assert "forward" not in new
    assert filled(new, full_document()) == new
    forward = filled(page.replace("train", "forward"), full_document())
    assert "| KL, mean | KL, largest |" in forward
    assert re.search(r"\n\| ONNX Runtime, int4 \|.*\| 1.0e-07 \| 1.0e-06 \|\n", forward)
    assert re.search(r"\n\| bound \|.*x \| - \| - \|\n", forward)
    quality = filled(page.replace("train", "quality"), full_document())
    assert "\n| int8 | 6.0000 | +50.000% | 2.0e-05 | 2.0e-04 |\n" in quality
    for count, said in ((64, " 64 threads,"), (1, " 1 thread,")):
        document = full_document()
        document["machine"]["threads"] = count
        assert said in filled(page.replace("train", "machine"), document)
    with pytest.raises(AssertionError, match="no figures of 'speed'"):
        filled(page.replace("train", "speed"), full_document())
