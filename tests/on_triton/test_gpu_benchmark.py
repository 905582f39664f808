import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.checks import compare

ROOT = Path(__file__).parents[2]


def _run(*arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_from_end_to_end_without_a_gpu(tmp_path):
    run = _run("--dry-run", "--out", tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"]["dry_run"]
    assert "figures mean nothing" in (tmp_path / "table.md").read_text()
    ours = {"operations": "peer", "training": "train", "decoding": "decode"}
    for section, key in ours.items():
        timed = [row for row in results[section] if row[key] == "fastgpt"]
        assert timed, section
        assert all(row["seconds"] > 0 for row in timed)
        assert len({row[key] for row in results[section]}) > 3, section
    in_rows = [row for row in results["decoding"] if row["decode"].startswith("fastgpt, prompts")]
    assert len(in_rows) == 2
    assert all(row["seconds"] > 0 for row in in_rows)
    assert {row["dtype"] for row in results["checks"]} == {"float32", "float16", "bfloat16"}


@pytest.mark.parametrize("at", [0, 1])
def test_nan_is_a_failed_check_wherever_it_stands(at):
    exact = (torch.ones(2, dtype=torch.float64),) * 2
    ours = [torch.ones(2), torch.ones(2)]
    assert compare(tuple(ours), exact, exact)["ok"]
    ours[at] = torch.tensor([1.0, float("nan")])
    assert not compare(tuple(ours), exact, exact)["ok"]


def test_no_time_left_is_said(tmp_path):
    run = _run("training", "--dry-run", "--out", tmp_path, "--budget", 0)
    assert run.returncode == 1
    rows = json.loads((tmp_path / "results.json").read_text())["training"]
    assert all("OutOfTimeError" in row["failed"] for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(tmp_path):
    run = _run("--out", tmp_path / "results")
    assert run.returncode == 2
    assert "torch finds no GPU" in run.stdout
    assert not (tmp_path / "results").exists()
