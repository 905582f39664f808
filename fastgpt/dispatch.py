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
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastgpt import batch_invariance, cpu, torch_state, triton
from fastgpt.torch_state import transformed
from fastgpt.triton import launch_table

NAMES = ("auto", "triton", "cpu", "reference")
P = ParamSpec("P")
T = TypeVar("T")


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
    narrow: Mapping[str, tuple[torch.dtype, ...]]  # by operation, more dtypes


_ON_GPU = (torch.float32, torch.float16, torch.bfloat16)
_KERNELS = {
    "triton": _Kernels(
        "cuda",
        _ON_GPU,
        lambda index: torch_state.lacking or triton.reason(index),
        launch_table.WIDEST,
        {},
    ),
    "cpu": _Kernels(
        "cpu",
        (torch.float32,),
        lambda index: torch_state.lacking or cpu.missing_reason(),
        {},
        dict.fromkeys(("layer_norm", "linear_cross_entropy"), (torch.bfloat16, torch.float16)),
    ),
}
_BY_DEVICE = {row.device: name for name, row in _KERNELS.items()}
# By device, the operations that are ours in a compiled graph too; Inductor fuses all others.
_IN_GRAPHS = {
    "cuda": ("causal_attention", "linear_cross_entropy"),
    "cpu": ("causal_attention", "gelu"),
}

_asked: ContextVar[str | None] = ContextVar("fastgpt_backend", default=None)
# The names inside whose `use_backend` some thread is now. torch.compile can't read a ContextVar,
# but it makes a new graph when this changes.
_entered: tuple[str, ...] = ()
_entering = threading.Lock()


def backends() -> dict[str, Backend]:
    """Each backend by name, whether it can run here, why not, and what it takes."""
    return {name: _backend(name) for name in NAMES if name != "auto"}


def _backend(name: str) -> Backend:
    if name == "triton":
        reason = _KERNELS[name].reason(None)
        failed = "".join(f"; {op} runs on reference: {why}" for (op, _), why in _failed.items())
        detail = (
            "CUDA and ROCm tensors in float32, float16 and bfloat16; never run on a GPU yet; other "
            f"dtypes run on reference{failed}"
        )
    elif name == "cpu":
        reason = _KERNELS[name].reason(None)
        isa = f"{cpu.isa()} (of {', '.join(cpu.isas())})" if reason is None else "not loaded"
        isa += f", products of many rows by {cpu.blas()}" if reason is None and cpu.blas() else ""
        detail = (
            f"CPU tensors in float32, whole models and blocks also in bfloat16 and float16, "
            f"instruction set {isa}; other dtypes run on reference"
        )
        if reason is None and cpu.passed_over:
            detail += f"; auto passes it over: {cpu.passed_over}"
    else:
        reason, detail = None, "PyTorch's own best form, any device and dtype"
    return Backend(name, reason is None, reason, detail)


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: unknown backend {name!r}, expected one of {', '.join(NAMES)}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operation inside on the backend of that name, in this thread or task alone; also
    in threads that start inside where Python hands them the context (3.14 without a GIL does).

    Args:
        name: "auto", "triton", "cpu" or "reference".

    Raises:
        ValueError: the name is none of these.
        BackendError: the backend cannot run on this machine; or, from an operation inside, on its
            tensors.
    """
    _checked(name, "use_backend")
    if name != "auto":
        _require(name)
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
    _require(_checked(name, "FASTGPT_BACKEND"))


def _require(name: str) -> None:
    """Asks that backend alone: to look at the others might set a GPU up."""
    backend = _backend(name)
    if not backend.available:
        raise BackendError(f"backend {name!r} cannot run here: {backend.reason}")


def choose(op: str, *tensors: Tensor | None, beside: Iterable[Tensor] = ()) -> str:
    """The backend for these tensors: "triton", "cpu" or "reference".

    Args:
        op: the operation's name.
        tensors: of one dtype, the first with the dimension that may be too wide last.
        beside: more of them, of any dtype that the backend takes.

    Raises:
        BackendError: a backend asked for by name cannot take them, or ``batch_invariant`` was and
            none can.
    """
    given = [t for t in tensors if t is not None]
    found = _choice(op, given, beside)
    if batch_invariance.asked():
        if needs_grad(*given, *beside):
            check_invariance(op, "gradients are recorded, so enter torch.no_grad() too")
        elif found != "cpu":
            check_invariance(op, explained(op, given[0])[1])
    return found


def _choice(op: str, given: list[Tensor], beside: Iterable[Tensor]) -> str:
    name = requested()
    if name == "reference" or (torch_state.lacking is None and not direct((*given, *beside))):
        return "reference"
    backend = _asked_for(name, op, given[0].device)
    if backend is None:
        return "reference"
    reason = _obstacle(backend, op, given, beside)
    if reason is None:
        return backend
    if name != "auto":
        raise BackendError(f"backend {name!r} cannot run {op}: {reason}")
    check_invariance(op, reason)
    _say_once(backend, reason)
    return "reference"


def check_invariance(op: str, reason: str | None) -> None:
    """Called before an operation runs as PyTorch's own, for a reason.

    Raises:
        BackendError: the caller is inside ``batch_invariant``.
    """
    # torch.compile can't read whether it is, and inside nothing is compiled.
    if not torch.compiler.is_compiling() and batch_invariance.asked():
        raise BackendError(
            f"batch_invariant: {op} would run in a way whose sums follow the size of the batch"
            + (f": {reason}" if reason else "")
        )


def explained(op: str, like: Tensor) -> tuple[str, str | None]:
    """The backend that ``choose`` takes for tensors such as this one, and why it is not the one of
    the device or of the request; says and raises nothing.
    """
    backend = _asked_for(requested(), op, like.device)
    if backend == "reference":
        return backend, None
    if backend is None:
        slower = cpu.passed_over if like.device.type == "cpu" else None
        return "reference", slower or f"no kernels for {like.device.type}"
    reason = _obstacle(backend, op, [like], ())
    return (backend, None) if reason is None else ("reference", reason)


def on_triton(op: str, like: Tensor) -> bool:
    """Whether the operation may run on Triton for tensors such as this; says and raises nothing."""
    if batch_invariance.asked():
        return False
    backend = _asked_for(requested(), op, like.device)
    return backend == "triton" and direct((like,)) and _obstacle(backend, op, [like], ()) is None


def lacks_kernels(device: torch.device) -> bool:
    """Whether ``auto`` runs all on PyTorch's own operations there, a GPU without Triton."""
    on_gpu = requested() == "auto" and _BY_DEVICE.get(device.type) == "triton"
    return on_gpu and not batch_invariance.asked() and bool(_KERNELS["triton"].reason(device.index))


def _asked_for(name: str, op: str, device: torch.device) -> str | None:
    """The backend of that name; for "auto" the device's, or None if it has none that is faster."""
    if name != "auto":
        return name
    # PyTorch has nothing for a narrow weight but to widen it in each call.
    if device.type == "cpu" and cpu.passed_over and op != "quantized_linear":
        return None
    return _BY_DEVICE.get(device.type)


def kernels(op: str, *tensors: Tensor | None, beside: Iterable[Tensor] = ()) -> Any:
    """The module with the operation's kernels for these tensors; None for PyTorch's own form.

    Raises:
        BackendError: a backend asked for by name cannot take them.
    """
    return module(choose(op, *tensors, beside=beside), op, tensors[0])


def module(backend: str, op: str, like: Tensor | None) -> Any:
    """The module with the operation's kernels, to be launched on the tensor's device; None for
    "reference".
    """
    if backend == "reference":
        return None
    if backend == "triton":
        return _launchers(op, None if like is None else like.device.index)
    return _module(backend, op)


@functools.cache
def _module(backend: str, op: str) -> ModuleType:
    return importlib.import_module(f"fastgpt.{backend}.{op}")


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


class KernelError(RuntimeError):
    """A Triton kernel can't be compiled or launched: its operation runs on the reference from now
    on.
    """


# By operation and the GPU's index, why a kernel of it could not be launched.
_failed: dict[tuple[str, int | None], str] = {}


class Launchers:
    """The launchers of an operation, with that GPU as the current one, where Triton launches.

    One whose kernel can't be compiled or launched raises KernelError, or BackendError if the
    backend was asked for by name.
    """

    def __init__(self, op: str, index: int | None) -> None:
        self._op, self._index = op, index

    @property
    def failed(self) -> bool:
        """Whether one of them has."""
        return (self._op, self._index) in _failed

    def __getattr__(self, name: str) -> Any:
        launcher = getattr(_module("triton", self._op), name)

        @functools.wraps(launcher)
        def launch(*args: Any, **kwargs: Any) -> Any:
            try:
                with torch.cuda.device(self._index) if _several_gpus() else _nothing:
                    return launcher(*args, **kwargs)
            except Exception as error:
                if not triton.cannot_run(error):
                    raise
                reason = f"a kernel of {self._op} failed, {triton.described(error)}"
                _failed[self._op, self._index] = reason
                if requested() == "triton":
                    raise BackendError(f"backend 'triton' cannot run here: {reason}") from error
                _say_once("triton", reason)
                raise KernelError(reason) from error

        setattr(self, name, launch)
        return launch


_launchers = functools.cache(Launchers)
_nothing = contextlib.nullcontext()


def falls_back(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator of what asks for kernels: runs it again where one of them turns out not to run.

    Of a registered operation torch reads the annotations with this module's names.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except KernelError:
            return function(*args, **kwargs)

    return run


def first(launcher: Callable[..., None], other: Callable[..., None]) -> Callable[..., None]:
    """A launcher that runs the other one, which writes all outputs anew, where its kernels fail."""

    def run(*args: Any, **kwargs: Any) -> None:
        try:
            launcher(*args, **kwargs)
        except KernelError:
            other(*args, **kwargs)

    return run


def first_order(kernels: Any, *gradients: Tensor) -> bool:
    """Whether a backward pass may run these kernels on the gradients: none has failed, no second
    derivative is wanted, and nothing watches or transforms.
    """
    failed = isinstance(kernels, Launchers) and kernels.failed
    return not failed and not torch.is_grad_enabled() and direct(gradients)


def direct(tensors: Iterable[Tensor]) -> bool:
    """Whether a kernel may read these tensors' memory with nothing watching or transforming.

    Not so under a dispatch mode (fake tensors, FLOP counters), a transform, tracing, or for a
    tensor subclass: all of these want to see PyTorch's own operations. Nor for a sparse tensor.
    """
    return (
        not torch_state.recorded()
        and not transformed()
        and all(_is_plain(t) and t.layout is torch.strided for t in tensors)
    )


def _is_plain(t: Tensor) -> bool:
    return type(t) is Tensor or type(t) is torch.nn.Parameter


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for this tensor's device."""
    device = x.device.type
    # The compiler of torch 2.5 and 2.9 cannot trace the question whether a device has autocast.
    has_it = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return has_it and torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast narrows this device's products to; None if it is off."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else None


def takes_whole_pass(idx: Tensor) -> bool:
    """Whether a whole forward pass over these ids may run in C++; its weights are looked at
    elsewhere.
    """
    return not torch.is_grad_enabled() and runs_whole(idx)


def runs_whole(x: Tensor) -> bool:
    """Whether several operations in a row may run as one call into C++, as far as their input
    tells; their weights are looked at elsewhere.
    """
    return (
        not torch.compiler.is_compiling()
        and autocast_dtype(x) in (None, torch.bfloat16)
        and x.device.type == "cpu"
        and _asked_for(requested(), "forward", x.device) == "cpu"
        and cpu.missing_reason() is None
        and direct((x,))
    )


def traceable(op: str, *tensors: Tensor) -> bool:
    """Whether torch.compile should put the registered operation into its graph rather than
    PyTorch's own form. What is exported must load where fastgpt is not imported.
    """
    asked = _entered[-1] if _entered else os.environ.get("FASTGPT_BACKEND")
    if asked == "reference" or torch_state.exporting() or transformed():
        return False
    first = tensors[0]
    alike = all(t.device == first.device and t.dtype == first.dtype for t in tensors)
    if not (alike and all(map(_is_plain, tensors)) and op in _IN_GRAPHS.get(first.device.type, ())):
        return False
    if first.device.type == "cuda":
        takes = triton.missing is None and first.dtype in _ON_GPU
        return takes and not triton.too_old_gpu(first.device.index)
    passed_over = cpu.missing is not None or (cpu.passed_over and asked != "cpu")
    return first.dtype == torch.float32 and not passed_over


def _obstacle(backend: str, op: str, tensors: list[Tensor], beside: Iterable[Tensor]) -> str | None:
    """Why the backend's kernels cannot take these tensors, or None if they can."""
    device, dtypes, reason, widest, narrow = _KERNELS[backend]
    dtypes += narrow.get(op, ())
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
    return _failed.get((op, first.device.index)) or reason(first.device.index)


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))


# Of threads that find the same at once one says it. Reentrant, as what a warning calls may be ours.
_saying = threading.RLock()


def _say_once(backend: str, reason: str) -> None:
    with _saying:
        _say(backend, reason)


@functools.cache
def _say(backend: str, reason: str) -> None:
    warnings.warn(
        f"fastgpt's {backend} backend is passed over for PyTorch's own operations: {reason}",
        BackendWarning,
        stacklevel=6,
    )


def readable(t: Tensor) -> bool:
    """Whether a tensor's values may be looked at: not while something watches, transforms or
    captures a CUDA graph.
    """
    if torch.compiler.is_compiling() or not direct((t,)):
        return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
