"""How the C++ extension is loaded: which OpenMP runtime it takes, what is said where it can't be,
and that it needs no GIL.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import cpu

PACKAGE = Path(fastgpt.__file__).parent
TORCH = Path(torch.__file__).parent
TORCHS = [*TORCH.glob("lib/libgomp*.so*"), *TORCH.parent.glob("torch.libs/libgomp*.so*")]
PLACES = ("lib*", "lib*/*-linux-gnu", "usr/lib*", "usr/lib*/*-linux-gnu")
SYSTEMS = {file.resolve() for at in PLACES for file in Path("/").glob(f"{at}/libgomp.so.1")}

linux = pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP runtime is Linux's here")
built = pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing))

SAYS = """
import json, os, fastgpt
rows = [line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line]
row = fastgpt.backends()["cpu"]
openmp = row.available and fastgpt.cpu._C.has_openmp()
print(json.dumps([row.available, row.reason, openmp, sorted(set(map(os.path.realpath, rows)))]))
"""


def what_it_says(command, package=PACKAGE):
    """Of the cpu backend, elsewhere: (available, reason, whether its threads are OpenMP's, the
    OpenMP runtimes in the process).
    """
    run = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=package.parent,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def without_the_systems_libgomp():
    """The start of a command that runs the rest of it where the system's libgomp is an empty file,
    in mounts of its own; skips where that is not allowed.
    """
    mounts = "".join(f"mount --bind /dev/null {path} && " for path in SYSTEMS)
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mounts + 'exec "$@"', "sh"]
    if shutil.which("unshare") is None:
        pytest.skip("unshare is missing, so the system's libgomp cannot be hidden")
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"the system's libgomp cannot be hidden here: {tried.stderr.strip()}")
    return command


@linux
@built
@pytest.mark.parametrize("hidden", [False, True], ids=["system", "no-system"])
@pytest.mark.parametrize("first", ["fastgpt", "torch", "fastgpt._C"])
def test_torchs_openmp_runtime_is_enough_and_the_only_one(first, hidden):
    start = without_the_systems_libgomp() if hidden else []
    command = [*start, sys.executable, "-W", "error", "-c", f"import {first}\n{SAYS}"]
    available, reason, openmp, runtimes = what_it_says(command)
    assert (available, reason, openmp) == (True, None, True)
    assert runtimes == [os.path.realpath(at) for at in TORCHS]


@linux
@built
def test_an_extension_that_is_no_library_is_said(tmp_path):
    copy = tmp_path / "fastgpt"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / Path(cpu._C.__file__).name).write_bytes(b"")
    available, reason, *_ = what_it_says([sys.executable, "-c", SAYS], copy)
    assert not available
    assert "the C++ extension cannot be loaded: " in reason
    assert "file too short" in reason
    assert "compiler" not in reason


@built
@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL")
def test_a_python_without_a_gil_stays_without():
    code = """
import sys, tiktoken, torch
before = sys._is_gil_enabled()
import fastgpt
assert sys._is_gil_enabled() == before
"""
    command = [sys.executable, "-W", "error", "-c", code]  # a GIL that comes back is a warning
    run = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr
