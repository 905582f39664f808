"""What a user waits for when kernels are compiled: a line that says so, and several at a time."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import triton
from triton import knobs

# Before triton 3.8 the launch of a kernel whose compilation failed would find something that is no
# kernel. Before Python 3.13 threads that parse at once may fail (a SystemError of ast.parse).
SIDE_BY_SIDE = sys.version_info >= (3, 13) and hasattr(triton.FutureKernel, "__getattr__")

# Whether this thread's launches compile their kernels and run none.
_compiles_only: ContextVar[bool] = ContextVar("compiles_only", default=False)


def on_grid(kernel: Any, grid: Any) -> Callable[..., Any]:
    """``kernel[grid]``, by which each kernel is launched; in ``compile_ahead`` it only compiles."""
    if _compiles_only.get():
        return functools.partial(kernel.warmup, grid=grid)
    launch: Callable[..., Any] = kernel[grid]
    return launch


def compile_ahead(run: Callable[[], object]) -> None:
    """Compiles the kernels that run() launches side by side, and runs none of them; does nothing
    where that cannot be done.

    What run() then reads of their results is whatever lay there. A kernel that cannot be compiled
    raises its error when it is launched.
    """
    if knobs.runtime.interpret or not SIDE_BY_SIDE:
        return
    pool = ThreadPoolExecutor(os.cpu_count())
    with pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        token = _compiles_only.set(True)
        try:
            run()
        finally:
            _compiles_only.reset(token)


@functools.cache
def announce() -> None:
    """Logs a line when a kernel of ours is compiled, not found on the disk; once in a process."""
    before, said = knobs.compilation.listener, False

    def listen(*, src: Any, cache_hit: bool, **more: Any) -> None:
        nonlocal said
        if before is not None:
            before(src=src, cache_hit=cache_hit, **more)
        module = getattr(getattr(src, "fn", None), "__module__", None) or ""
        if said or cache_hit or not module.startswith("fastgpt."):
            return
        said = True
        logging.getLogger("fastgpt").warning(
            "fastgpt compiles its Triton kernels for this GPU, each when it is first needed, which "
            "may take half a minute in all; they stay in %s for the next time",
            knobs.cache.dir,
        )

    knobs.compilation.listener = listen
