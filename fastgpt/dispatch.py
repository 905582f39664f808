"""Which backend runs an operation: by the tensors' device, unless one was asked for by name.

``auto`` takes the fused backend of the device and falls back to PyTorch's own best form
("reference") where that backend is missing or cannot take the tensors, and says so once. A backend
asked for by name, through ``use_backend`` or ``FASTGPT_BACKEND``, raises ``BackendError`` instead.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from fastgpt import cpu

NAMES = ("auto", "triton", "cpu", "reference")


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run, here or on these tensors."""


class BackendWarning(UserWarning):
    """A fused backend was passed over for PyTorch's own form. Said once for each reason."""


class Backend(NamedTuple):
    """One row of ``fastgpt.backends()``."""

    name: str
    available: bool
    reason: str | None  # why it cannot run here
    detail: str  # what it takes, and what it runs on


_asked: ContextVar[str | None] = ContextVar("fastgpt_backend", default=None)


def backends() -> dict[str, Backend]:
    """Each backend by name, whether it can run here, why not, and what it takes."""
    reason = cpu.missing_reason()
    isa = f"{cpu.isa()} (of {', '.join(cpu.isas())})" if reason is None else "not loaded"
    rows = (
        Backend("triton", False, "not in this version yet", "CUDA tensors run on reference"),
        Backend(
            "cpu",
            reason is None,
            reason,
            f"CPU tensors in float32, instruction set {isa}; other dtypes run on reference",
        ),
        Backend("reference", True, None, "PyTorch's own best form, any device and dtype"),
    )
    return {row.name: row for row in rows}


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: unknown backend {name!r}, expected one of {', '.join(NAMES)}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operation inside on the backend of that name, in this thread or task alone.

    Args:
        name: "auto", "triton", "cpu" or "reference".

    Raises:
        ValueError: the name is none of these.
        BackendError: the backend cannot run on this machine; or, from an operation inside, on its
            tensors.
    """
    _checked(name, "use_backend")
    if name != "auto":
        _require(backends()[name])
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def requested() -> str:
    """The backend asked for by ``use_backend``, else by ``FASTGPT_BACKEND``, else "auto"."""
    name = _asked.get()
    if name is None:
        name = os.environ.get("FASTGPT_BACKEND") or "auto"
        if name != "auto":
            _require_by_environment(name)
    return name


@functools.cache
def _require_by_environment(name: str) -> None:
    if _checked(name, "FASTGPT_BACKEND") != "auto":
        _require(backends()[name])


def _require(backend: Backend) -> None:
    if not backend.available:
        raise BackendError(f"backend {backend.name!r} cannot run here: {backend.reason}")


def choose(op: str, *tensors: torch.Tensor | None) -> str:
    """The backend for these tensors: "cpu" or "reference".

    Raises:
        BackendError: a backend asked for by name cannot take them.
    """
    name = requested()
    given = [t for t in tensors if t is not None]
    if name == "reference" or not _direct(given):
        return "reference"
    reason = _obstacle(given)
    if reason is None:
        return "cpu"
    if name != "auto":
        raise BackendError(f"backend {name!r} cannot run {op}: {reason}")
    if given[0].device.type == "cpu":
        _say_once(reason)
    return "reference"


def kernels(op: str, *tensors: torch.Tensor | None) -> Any:
    """The module with the operation's kernels for these tensors; None for PyTorch's own form.

    Raises:
        BackendError: a backend asked for by name cannot take them.
    """
    backend = choose(op, *tensors)
    return None if backend == "reference" else _module(backend, op)


@functools.cache
def _module(backend: str, op: str) -> ModuleType:
    return importlib.import_module(f"fastgpt.{backend}.{op}")


def once(*gradients: torch.Tensor) -> bool:
    """Whether a backward pass may run kernels on these gradients: no second derivative is wanted,
    and nothing watches or transforms.
    """
    return not torch.is_grad_enabled() and _direct(gradients)


def transformed() -> bool:
    """Whether a functorch transform or forward-mode differentiation is at work."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _direct(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a kernel may read these tensors' memory with nothing watching or transforming.

    Not so under a dispatch mode (fake tensors, FLOP counters), a transform, tracing, or for a
    tensor subclass: all of these want to see PyTorch's own operations.
    """
    return (
        _len_torch_dispatch_stack() == 0
        and not transformed()
        and torch._C._get_tracing_state() is None
        and all(type(t) is torch.Tensor or type(t) is torch.nn.Parameter for t in tensors)
    )


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for this tensor's device."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def takes_whole_pass(idx: torch.Tensor) -> bool:
    """Whether a whole forward pass over these ids may run in C++; its weights are looked at
    elsewhere.
    """
    return not torch.is_grad_enabled() and runs_whole(idx)


def runs_whole(x: torch.Tensor) -> bool:
    """Whether several operations in a row may run as one call into C++, as far as their input
    tells; their weights are looked at elsewhere.
    """
    return (
        not torch.compiler.is_compiling()
        and requested() in ("auto", "cpu")
        and x.device.type == "cpu"
        and cpu.missing_reason() is None
        and not autocasts(x)
        and _direct((x,))
    )


def traceable(*tensors: torch.Tensor) -> bool:
    """Whether torch.compile should put the registered operation into its graph rather than
    PyTorch's own form.
    """
    return cpu.missing is None and all(
        t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors
    )


def _obstacle(tensors: Iterable[torch.Tensor]) -> str | None:
    """Why the C++ kernels cannot take these tensors, or None where they can."""
    for t in tensors:
        if t.device.type != "cpu":
            return f"it takes CPU tensors, these are on {t.device}"
        if t.dtype != torch.float32:
            return f"it takes float32, these are {str(t.dtype).removeprefix('torch.')}"
    return cpu.missing_reason()


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(
        f"fastgpt's C++ backend is passed over for PyTorch's own operations: {reason}",
        BackendWarning,
        stacklevel=4,
    )


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
