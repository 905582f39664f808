"""Runs pytest on another build of the extension:
`python tests/another_build.py PACKAGE_DIR TRAIT,... [ARGUMENT]...`

The source tree may hold a plain build of the same package, so this imports the one to test before
pytest can find another, and refuses one that isn't in PACKAGE_DIR or lacks a trait.
"""

import sys
from pathlib import Path

import pytest

RUNTIMES = {"address": b"__asan_", "undefined": b"__ubsan_", "thread": b"__tsan_"}

package_dir = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(package_dir))

import fastgpt  # noqa: E402, F401 - and with it torch, whose OpenMP runtime the extension would take
from fastgpt import _C  # noqa: E402

extension = Path(_C.__file__)
assert extension.is_relative_to(package_dir), f"{extension} is not from {package_dir}"
has = {name: runtime in extension.read_bytes() for name, runtime in RUNTIMES.items()}
has |= {"own-threads": not _C.has_openmp(), str(_C.blas()): True}
for trait in sys.argv[2].split(","):
    assert has.get(trait), f"{extension} has no {trait}"
print(f"another build: {extension}", flush=True)

# The sanitizers write to file descriptor 2 and end the process, so pytest must leave it open.
sys.exit(pytest.main(["--capture=sys", *sys.argv[3:]]))
