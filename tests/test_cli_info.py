"""`fastgpt info`."""

import importlib.metadata
import json
import subprocess
import sys

import torch

import fastgpt
from fastgpt import cli
from fastgpt.cli import info


def test_facts(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["machine"]["threads"] == torch.get_num_threads()
    assert facts["versions"]["tiktoken"] == importlib.metadata.version("tiktoken")
    for row in fastgpt.backends().values():
        assert row.detail in facts["backends"][f"backend {row.name}"]
        assert facts["missing"].get(f"backend {row.name}") == row.reason
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for part in ("backend cpu ", "threads ", torch.__version__, "missing:"):
        assert part in out


def test_what_is_missing(capsys, monkeypatch):
    version = importlib.metadata.version

    def without_rich(name):
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(info.importlib.metadata, "version", without_rich)
    monkeypatch.setattr(fastgpt.cpu, "missing_reason", lambda: "no compiler")
    monkeypatch.setenv("FASTGPT_CPU_ISA", "")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "no compiler" in out
    assert "pip install 'fastgpt[cli]'" in out
    assert "FASTGPT_CPU_ISA" in out


def test_a_backend_by_name_that_is_none(capsys, monkeypatch):
    monkeypatch.setenv("FASTGPT_BACKEND", "gpu")
    assert cli.main(["info"]) == 2
    assert "unknown backend 'gpu'" in capsys.readouterr().err


def test_the_core_install_is_enough():
    code = (
        "import sys\n"
        "for name in ('rich', 'safetensors', 'matplotlib', 'numpy', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "import fastgpt.training\n"
        "from fastgpt import cli\n"
        "sys.exit(cli.main(['info']) or cli.main(['train', 'x', '--out', 'y']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "backend reference" in done.stdout
    assert done.stderr.splitlines()[-1] == (
        "fastgpt train: training needs safetensors: pip install 'fastgpt[train]'"
    )
