"""Runs pytest on a sanitized extension:
`python tests/sanitized.py PACKAGE_DIR SANITIZER,... [ARGUMENT]...`

The source tree may hold a plain build of the same package, so this imports the one to test before
pytest can find another, and refuses one that isn't in PACKAGE_DIR or isn't instrumented.
"""

import sys
from pathlib import Path

import pytest

RUNTIMES = {"address": b"__asan_", "undefined": b"__ubsan_", "thread": b"__tsan_"}

package_dir = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(package_dir))

import fastgpt._C  # noqa: E402

extension = Path(fastgpt._C.__file__)
assert extension.is_relative_to(package_dir), f"{extension} is not from {package_dir}"
for sanitizer in sys.argv[2].split(","):
    runtime = RUNTIMES[sanitizer]
    assert runtime in extension.read_bytes(), f"{extension} doesn't call {runtime.decode()}*"
print(f"sanitized extension: {extension}", flush=True)

# The sanitizers write to file descriptor 2 and end the process, so pytest must leave it open.
sys.exit(pytest.main(["--capture=sys", *sys.argv[3:]]))
