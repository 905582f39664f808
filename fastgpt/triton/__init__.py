"""The Triton backend for CUDA and ROCm tensors: one file an operation, each kernels and then a thin
launcher that writes ready outputs.

Importing this package imports no triton; its modules do, but for ``launch_table`` and ``vendor``.
They are to be imported where ``reason()`` is None.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import subprocess
import sys
import traceback

import torch

OLDEST = (3, 6)  # the first triton that the kernels are tested with
# How a driver refuses a launch for its size, the second a cooperative one.
_TOO_LARGE = ("too many resources requested for launch", "too many blocks in cooperative launch")


def how_to_install() -> str:
    """What brings triton to this platform, for a message."""
    packages = {"linux": "triton", "win32": "triton-windows"}
    package = packages.get(sys.platform)
    return f"pip install {package}" if package else f"there is none for {sys.platform}"


# Why there is no triton.
missing = (
    None
    if importlib.util.find_spec("triton") is not None
    else f"triton is not installed ({how_to_install()})"
)


def missing_reason() -> str | None:
    """Why triton cannot be imported here, or None if it can. A GPU is not looked for."""
    return missing


def too_old() -> str | None:
    """Why this triton cannot compile the kernels, or None if it is new enough. Imports it."""
    version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST:
        return None
    oldest = ".".join(map(str, OLDEST))
    return f"the kernels need triton {oldest} or newer, this is {version}"


@functools.cache
def reason(index: int | None = None) -> str | None:
    """Why the kernels cannot run on the GPU of that index, or, without one, on any; None if they
    can. The first question launches a kernel.
    """
    if missing is not None:
        return missing
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if index is None:
        # The current one first, for a kernel on another takes memory there.
        current = torch.cuda.current_device()
        order = (current, *(i for i in range(torch.cuda.device_count()) if i != current))
        return next((None for i in order if reason(i) is None), reason(current))
    if too_old_gpu(index):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        return f"the kernels need an sm_80 or newer, the {name} is an sm_{major}{minor}"
    return launch_failure(torch.device("cuda", index))


def too_old_gpu(index: int) -> bool:
    """Whether the GPU of that index is too old for the kernels; of one that is not here, no."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(index) < (8, 0)


def launch_failure(device: torch.device) -> str | None:
    """Why the smallest kernel cannot be launched there; None if it was."""
    x = torch.empty(1, dtype=torch.int32, device=device)
    try:
        if (old := too_old()) is not None:
            return old
        probe = importlib.import_module("fastgpt.triton.probe")
        with torch.cuda.device_of(x):
            probe.write_one(x)
        importlib.import_module("fastgpt.triton.compilation").announce()
    # Whatever goes wrong with so small a kernel goes wrong with every other one, and what a GPU in
    # an error state raises, PyTorch's own operations raise again.
    except Exception as error:
        return f"triton cannot launch a kernel: {described(error)}"
    return None


def cannot_run(error: Exception) -> bool:
    """Whether an error that a launcher raised says that its kernel can't be compiled or launched.

    Not so for what the GPU's driver reports, which may come from any earlier kernel.
    """
    from triton.errors import TritonError

    if isinstance(error, (TritonError, subprocess.CalledProcessError)):
        return True
    if type(error) is not RuntimeError:
        return False
    if str(error).startswith("Triton Error ["):  # the driver's
        return any(words in str(error) for words in _TOO_LARGE)
    *_, (raised_in, _) = traceback.walk_tb(error.__traceback__)
    return str(raised_in.f_globals.get("__name__")).startswith("triton.")


def described(error: Exception) -> str:
    """The error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
