"""`fastgpt info`."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
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
    assert "pip install rich" in out
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
        "fastgpt train: training needs safetensors: pip install matplotlib numpy rich safetensors"
    )


@pytest.mark.parametrize("over_ours", [True, False])
def test_a_stranger_s_library_of_the_same_name_is_named(tmp_path, over_ours):
    """pip leaves a RECORD of what it has put where; a distribution elsewhere does no harm."""
    info = tmp_path / "fastgpt-0.0.8.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastgpt\nVersion: 0.0.8\n")
    (info / "RECORD").write_text("fastgpt/__init__.py,,\n")
    here = Path(fastgpt.__file__).parent
    if over_ours:
        (tmp_path / "fastgpt").symlink_to(here)
    path = os.pathsep.join([str(tmp_path), str(here.parent)])
    command = [sys.executable, "-W", "default", "-m", "fastgpt", "info"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    said = "another library, the distribution fastgpt 0.0.8, is installed into the same folder"
    assert (said in done.stdout) == (said in done.stderr) == over_ours
