"""The C++ backend: one file an operation, each a thin launcher that hands addresses to
``fastgpt._C``.

``isas()`` lists the instruction sets that this machine can run, ``isa()`` names the active one (the
last of them, or the one in ``FASTGPT_CPU_ISA``), ``use_isa(name)`` makes another active for a
while, ``blas()`` names the BLAS in use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Iterator

# Whose OpenMP runtime the extension looks for.
import torch  # noqa: F401

from fastgpt.cpu import processors


def _why_not_loaded(error: ImportError) -> str:
    """Why there is no extension."""
    if isinstance(error, ModuleNotFoundError):
        return f"the C++ extension is missing: {error} (was there a C++ compiler at install?)"
    return f"the C++ extension cannot be loaded: {error}"


missing: str | None = None  # why there is no extension
try:
    _C = importlib.import_module("fastgpt._C")
except ImportError as error:
    _C = None  # type: ignore[assignment]
    missing = _why_not_loaded(error)

if _C is not None and (allowed := processors.quota()):
    _C.limit_threads(allowed)


def _slower() -> str | None:
    """Why PyTorch's own form is or may be the faster one on this machine."""
    if sys.platform == "darwin":
        return "it has not been timed on a Mac yet"
    if sys.platform == "win32":
        return "it has not been timed on Windows yet"
    if _C is not None and _C.isa() == "baseline":
        return "its baseline build is slower than PyTorch's own operations"
    return None


# Why "auto" leaves the kernels alone though they can run, or None where it takes them, as it does
# an instruction set that was asked for by name. A variable, which torch.compile can read.
passed_over: str | None = None if os.environ.get("FASTGPT_CPU_ISA") else _slower()


@functools.cache
def missing_reason() -> str | None:
    """Why the C++ kernels cannot run here, or None if they can.

    Raises:
        ValueError: ``FASTGPT_CPU_ISA`` names an instruction set that cannot run here.
    """
    if missing is None and (name := os.environ.get("FASTGPT_CPU_ISA")):
        _set(name, "FASTGPT_CPU_ISA")
    return missing


def _set(name: str, where: str) -> None:
    if name not in isas():
        here = ", ".join(isas()) or "none"
        raise ValueError(f"{where}: instruction set {name!r} cannot run here, only {here}")
    _C.set_isa(name)


def isas() -> list[str]:
    """The instruction sets that this machine can run, slowest first; none without the extension."""
    return _C.isas() if _C is not None else []


def isa() -> str | None:
    """The active instruction set; None without the extension."""
    return _C.isa() if missing_reason() is None else None


def blas() -> str | None:
    """The BLAS that makes products of many rows; None where the kernels make them, which they do if
    there is none or it does not sum up rows alike.
    """
    return _C.blas() if missing_reason() is None else None


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Makes an instruction set the active one, for the whole process, until the block ends.

    Raises:
        ValueError: it cannot run here.
    """
    global passed_over
    before = isa(), passed_over
    _set(name, "use_isa")
    passed_over = None
    try:
        yield
    finally:
        _C.set_isa(before[0])
        passed_over = before[1]
