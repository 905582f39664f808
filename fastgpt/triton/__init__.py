"""The Triton backend for CUDA and ROCm tensors: one file an operation, each kernels and then a thin
launcher that writes ready outputs.

Importing this package imports no triton; its modules do, but for ``settings`` and ``choices``. They
are to be imported where ``missing_reason()`` is None.
"""

from __future__ import annotations

import functools
import importlib.util
import sys

import torch


def _missing() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"triton runs on Linux, this is {sys.platform}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None


missing = _missing()  # why there is no triton


def missing_reason() -> str | None:
    """Why triton cannot be imported here, or None where it can. A GPU is not looked for."""
    return missing


@functools.cache
def reason(index: int | None = None) -> str | None:
    """Why the kernels cannot run on the GPU of that index, or, without one, on any; None where they
    can.
    """
    if missing is not None:
        return missing
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if index is None:
        reasons = [reason(i) for i in range(torch.cuda.device_count())]
        return None if None in reasons else reasons[0]
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        return f"the kernels need an sm_80 or newer, the {name} is an sm_{major}{minor}"
    return None
