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
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fastgpt import cpu, torch_state, triton
from fastgpt.torch_state import transformed
from fastgpt.triton import settings

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


class _Kernels(NamedTuple):
    """What a backend with kernels of its own takes."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    reason: Callable[[int | None], str | None]  # why it cannot run on the device of that index
    widest: Mapping[str, int]  # by operation, the longest last dimension


_ON_GPU = (torch.float32, torch.float16, torch.bfloat16)
_KERNELS = {
    "triton": _Kernels("cuda", _ON_GPU, triton.reason, settings.WIDEST),
    "cpu": _Kernels("cpu", (torch.float32,), lambda index: cpu.missing_reason(), {}),
}
_BY_DEVICE = {row.device: name for name, row in _KERNELS.items()}

_asked: ContextVar[str | None] = ContextVar("fastgpt_backend", default=None)
# The names inside whose `use_backend` some thread is now: torch.compile can't read a ContextVar, but
# it makes a new graph when this changes.
_entered: tuple[str, ...] = ()
_entering = threading.Lock()


def backends() -> dict[str, Backend]:
    """Each backend by name, whether it can run here, why not, and what it takes."""
    no_gpu, reason = _KERNELS["triton"].reason(None), cpu.missing_reason()
    isa = f"{cpu.isa()} (of {', '.join(cpu.isas())})" if reason is None else "not loaded"
    rows = (
        Backend(
            "triton",
            no_gpu is None,
            no_gpu,
            "CUDA and ROCm tensors in float32, float16 and bfloat16; never run on a GPU yet; other "
            "dtypes run on reference",
        ),
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
    global _entered
    token = _asked.set(name)
    with _entering:
        _entered = (*_entered, name)
    try:
        yield
    finally:
        _asked.reset(token)
        with _entering:
            at = len(_entered) - 1 - _entered[::-1].index(name)
            _entered = _entered[:at] + _entered[at + 1 :]


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


def choose(op: str, *tensors: torch.Tensor | None, beside: Iterable[torch.Tensor] = ()) -> str:
    """The backend for these tensors: "triton", "cpu" or "reference".

    Args:
        op: the operation's name.
        tensors: of one dtype, the first with the dimension that may be too wide last.
        beside: more of them, of any dtype that the backend takes.

    Raises:
        BackendError: a backend asked for by name cannot take them.
    """
    name = requested()
    given = [t for t in tensors if t is not None]
    if name == "reference" or not _direct((*given, *beside)):
        return "reference"
    backend = _BY_DEVICE.get(given[0].device.type) if name == "auto" else name
    if backend is None:
        return "reference"
    reason = _obstacle(backend, op, given, beside)
    if reason is None:
        return backend
    if name != "auto":
        raise BackendError(f"backend {name!r} cannot run {op}: {reason}")
    _say_once(backend, reason)
    return "reference"


def on_triton(like: torch.Tensor) -> bool:
    """Whether tensors such as this one may run on the Triton backend; says and raises nothing."""
    name = requested()
    backend = _BY_DEVICE.get(like.device.type) if name == "auto" else name
    return backend == "triton" and _direct((like,)) and _obstacle(backend, "", [like], ()) is None


def kernels(op: str, *tensors: torch.Tensor | None, beside: Iterable[torch.Tensor] = ()) -> Any:
    """The module with the operation's kernels for these tensors; None for PyTorch's own form.

    Raises:
        BackendError: a backend asked for by name cannot take them.
    """
    return module(choose(op, *tensors, beside=beside), op, tensors[0])


def module(backend: str, op: str, like: torch.Tensor | None) -> Any:
    """The module with the operation's kernels, to be launched on the tensor's device; None for
    "reference".
    """
    if backend == "reference":
        return None
    found = _module(backend, op)
    if like is not None and like.is_cuda and _several_gpus():
        return _on_gpu(found, like.device.index)
    return found


@functools.cache
def _module(backend: str, op: str) -> ModuleType:
    return importlib.import_module(f"fastgpt.{backend}.{op}")


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


class _OnGpu:
    """A module whose launchers run with that GPU as the current one, where Triton launches."""

    def __init__(self, module: ModuleType, index: int) -> None:
        self._module, self._index = module, index

    def __getattr__(self, name: str) -> Any:
        launcher = getattr(self._module, name)

        @functools.wraps(launcher)
        def launch(*args: Any, **kwargs: Any) -> Any:
            with torch.cuda.device(self._index):
                return launcher(*args, **kwargs)

        setattr(self, name, launch)
        return launch


_on_gpu = functools.cache(_OnGpu)


def once(*gradients: torch.Tensor) -> bool:
    """Whether a backward pass may run kernels on these gradients: no second derivative is wanted,
    and nothing watches or transforms.
    """
    return not torch.is_grad_enabled() and _direct(gradients)


def _direct(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a kernel may read these tensors' memory with nothing watching or transforming.

    Not so under a dispatch mode (fake tensors, FLOP counters), a transform, tracing, or for a
    tensor subclass: all of these want to see PyTorch's own operations.
    """
    return (
        not torch_state.recorded()
        and not transformed()
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
    PyTorch's own form. What is exported must load where fastgpt is not imported.
    """
    asked = _entered[-1] if _entered else os.environ.get("FASTGPT_BACKEND")
    if asked == "reference" or torch_state.exporting():
        return False
    first = tensors[0]
    if not all(t.device == first.device and t.dtype == first.dtype for t in tensors):
        return False
    if first.device.type == "cuda":
        return triton.missing is None and first.dtype in _ON_GPU
    return cpu.missing is None and first.device.type == "cpu" and first.dtype == torch.float32


def _obstacle(
    backend: str, op: str, tensors: list[torch.Tensor], beside: Iterable[torch.Tensor]
) -> str | None:
    """Why the backend's kernels cannot take these tensors, or None where they can."""
    device, dtypes, reason, widest = _KERNELS[backend]
    for t in (*tensors, *beside):
        if t.device.type != device:
            return f"it takes {device.upper()} tensors, these are on {t.device}"
        if t.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"it takes {names}, these are {str(t.dtype).removeprefix('torch.')}"
    first = tensors[0]
    if any(t.dtype != first.dtype for t in tensors):
        return f"it takes tensors of one dtype, these are {_dtypes(tensors)}"
    if op in widest and first.dim() > 0 and first.shape[-1] > widest[op]:
        return f"it takes at most {widest[op]} wide ones in {op}, these are {first.shape[-1]} wide"
    return reason(first.device.index)


def _dtypes(tensors: Iterable[torch.Tensor]) -> str:
    return " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))


@functools.cache
def _say_once(backend: str, reason: str) -> None:
    warnings.warn(
        f"fastgpt's {backend} backend is passed over for PyTorch's own operations: {reason}",
        BackendWarning,
        stacklevel=4,
    )


def readable(t: torch.Tensor) -> bool:
    """Whether a tensor's values may be looked at: not while something watches, transforms or
    captures a CUDA graph.
    """
    if torch.compiler.is_compiling() or not _direct((t,)):
        return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
