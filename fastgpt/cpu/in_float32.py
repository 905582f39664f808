"""Launchers of float32 kernels on tensors of 16 bits: the same sums, rounded once at the end."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def in_float32(*written: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorator of a launcher: what it reads in 16 bits it gets in float32, and what it writes,
    the arguments of these names, is rounded to where it belongs.
    """

    def decorated(launcher: Callable[P, None]) -> Callable[P, None]:
        names = list(inspect.signature(launcher).parameters)

        @functools.wraps(launcher)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
            narrow = {
                name: t
                for name, t in given.items()
                if isinstance(t, Tensor) and t.dtype is not torch.float32
            }
            if not narrow:
                return launcher(*args, **kwargs)
            for name, t in narrow.items():
                is_new = name in written
                given[name] = torch.empty_like(t, dtype=torch.float32) if is_new else t.float()
            launcher(**given)  # type: ignore[call-arg]
            for name in written:
                if name in narrow:
                    narrow[name].copy_(given[name])
            return None

        return run

    return decorated
