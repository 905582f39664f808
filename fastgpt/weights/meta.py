"""Models whose parameters have no values yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)
_DRAWS = (Tensor.normal_, Tensor.uniform_)


def on_meta(cls: type[Model], cfg: Mapping[str, Any]) -> Model:
    """A model of this config on the meta device; draws no random numbers."""
    with torch.device("meta"), _NoDraw():
        return cls(cfg)


class _NoDraw(TorchFunctionMode):
    """Skips initialisation, which on the meta device would import PyTorch's compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def make_room(
    model: nn.Module, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> None:
    """Replaces parameters and buffers on meta by uninitialised ones; tied ones stay tied. The
    dtype is for parameters.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(p) not in made:
                empty = torch.empty(p.shape, dtype=dtype, device=device)
                made[id(p)] = nn.Parameter(empty, p.requires_grad)
            setattr(module, name, made[id(p)])
        for name, b in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if id(b) not in made:
                made[id(b)] = torch.empty_like(b, device=device or torch.get_default_device())
            setattr(module, name, made[id(b)])
