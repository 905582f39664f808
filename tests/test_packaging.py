"""The package as its users get it: built, installed and imported away from the source tree."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "tests" / "smoke.py"
# Nothing that points Python, the build or fastgpt at something of this process's own.
CLEAN_ENV = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("PYTHON", "FASTGPT_")) and name not in ("CC", "CXX", "VIRTUAL_ENV")
}
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++", "cl")))


def run(*command, env=CLEAN_ENV, **kwargs):
    """The output of a command; its failure is the test's, with all that it printed."""
    command = [str(part) for part in command]
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, **kwargs
    )
    if done.returncode:
        output = done.stdout + done.stderr
        if "No matching distribution found for" in output and "CI" not in os.environ:
            pytest.skip("the build's requirements can't be downloaded here")
        pytest.fail(f"{' '.join(command)} exited with {done.returncode}:\n{output}")
    return done.stdout


class Environment:
    """A virtual environment that has nothing, until `see_dependencies`."""

    def __init__(self, path):
        venv.create(path, symlinks=os.name != "nt")
        self.bin = path / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / "python"

    def install(self, package, env=CLEAN_ENV):
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps")
        run(*pip, package, env=env, cwd=self.bin)

    def see_dependencies(self):
        """Shows it the site-packages that hold torch, which saves installing gigabytes again.

        A folder that a .pth file names has its own .pth files left unread, so an editable install
        of this source tree stays out of sight.
        """
        modules = ("torch", "tiktoken", "numpy")
        folders = {Path(importlib.util.find_spec(name).origin).parents[1] for name in modules}
        purelib = run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        paths = "\n".join(map(str, sorted(folders)))
        (Path(purelib.strip()) / "dependencies.pth").write_text(paths + "\n")


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The source distribution and the wheel built from it, both in isolated environments."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def sources(*patterns):
    return {path.relative_to(ROOT).as_posix() for p in patterns for path in ROOT.glob(p)}


@pytest.mark.packaging
def test_sdist_holds_what_a_build_needs(dist):
    with tarfile.open(dist[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= sources("csrc/*", "fastgpt/**/*.py", "fastgpt/*.pyi", "tests/**/*.py")
    assert names >= {"pyproject.toml", "setup.py", "LICENSE", "README.md", "fastgpt/py.typed"}
    assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc"))]


@pytest.mark.packaging
def test_wheel_holds_the_package_and_nothing_else(dist):
    with zipfile.ZipFile(dist[1]) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
    info = metadata.partition("/")[0]
    assert headers["Name"] == "fastgpt-kernels"
    assert {name.partition("/")[0] for name in names} == {"fastgpt", info}
    files = {name for name in names if name.startswith("fastgpt/")}
    package = sources("fastgpt/**/*.py", "fastgpt/**/*.html", "fastgpt/*.pyi")
    package |= {"fastgpt/py.typed"}
    assert files >= package
    binaries = [name for name in files - package if name.startswith("fastgpt/_C.")]
    assert len(binaries) == len(files - package) == HAS_COMPILER

    required = [line for line in headers.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(required) == ["tiktoken>=0.7", "torch>=2.5.1"]
    assert headers["License-Expression"] == "Apache-2.0"


def test_ci_runs_the_lowest_torch_that_is_declared():
    declared = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    run = re.findall(r'\{torch: "([\d.]+)"', workflow)
    assert min(run, key=lambda version: [int(part) for part in version.split(".")]) == declared


@pytest.mark.packaging
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
def test_wheel_runs_in_a_clean_environment(dist, tmp_path):
    environment = Environment(tmp_path / "venv")
    environment.install(dist[1])
    environment.see_dependencies()
    print(run(environment.python, SMOKE, cwd=tmp_path))
    assert "compare" in run(environment.bin / "fastgpt", "--help", cwd=tmp_path)


@pytest.mark.packaging
def test_install_without_a_compiler_runs_on_the_reference(dist, tmp_path):
    environment = Environment(tmp_path / "venv")
    missing = str(tmp_path / "no-such-compiler")
    no_compiler = {**CLEAN_ENV, "PATH": str(environment.bin), "CC": missing, "CXX": missing}
    environment.install(dist[0], env=no_compiler)
    environment.see_dependencies()
    print(run(environment.python, SMOKE, "--no-extension", env=no_compiler, cwd=tmp_path))


IMPORT = """
import json, os, sys, torch
def state():
    modules = [m for m in sys.modules if m.split(".")[0] == "triton" or
               m.startswith(("torch._dynamo", "torch._inductor"))]
    return [sorted(modules), torch.get_num_threads(), torch.get_num_interop_threads(),
            str(torch.get_default_dtype()), str(torch.get_default_device()),
            torch.initial_seed(), torch.is_grad_enabled(), torch.cuda.is_initialized(),
            dict(os.environ)]
before = state()
import fastgpt
print(json.dumps([before, state()]))
"""


def test_import_changes_nothing_and_loads_no_compiler():
    output = run(sys.executable, "-W", "error", "-c", IMPORT, cwd=ROOT)
    before, after = json.loads(output)
    own = set(after[0]) - set(before[0])  # torch 2.5 imports a part of its compiler itself
    assert own == set(), "fastgpt imports triton or torch's compiler"
    assert after == before
