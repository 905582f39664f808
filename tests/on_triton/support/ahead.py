"""Compiles test_compiled.py's cases from the last to the first, in a process of its own, while the
other tests run and then these, from the first: they meet in triton's cache. What fails here fails
there.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

_TESTS = Path(__file__).parents[2]


@contextlib.contextmanager
def compiling_ahead():
    path = os.pathsep.join([str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "on_triton.support.ahead"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    from on_triton.test_compiled import cases

    for parameters in reversed(cases()):
        case, arch, mode = parameters.values
        with contextlib.suppress(Exception):
            case.launches(arch, mode)
