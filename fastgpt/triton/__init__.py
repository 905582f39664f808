"""The Triton backend for CUDA and ROCm tensors: one file an operation, each kernels and then a thin
launcher that writes ready outputs.

Importing this package imports no triton; its modules do. They are to be imported where
``missing_reason()`` is None.
"""

from __future__ import annotations

import functools
import importlib.util
import sys


@functools.cache
def missing_reason() -> str | None:
    """Why triton cannot be imported here, or None where it can. A GPU is not looked for."""
    if not sys.platform.startswith("linux"):
        return f"triton runs on Linux, this is {sys.platform}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fastgpt[triton]')"
    return None
