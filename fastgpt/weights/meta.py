"""Models that hold no numbers yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)
_DRAWS = (Tensor.normal_, Tensor.uniform_)


def on_meta(cls: type[Model], cfg: Mapping[str, Any]) -> Model:
    """The model of this config on the meta device; no random number is drawn."""
    with torch.device("meta"), _NoDraw():
        return cls(cfg)


class _NoDraw(TorchFunctionMode):
    """Leaves out initial values, which on the meta device would load PyTorch's compiler."""

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
    """Puts uninitialised parameters in the place of those on meta; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in made:
                empty = torch.empty(p.shape, dtype=dtype, device=device)
                made[id(p)] = nn.Parameter(empty, p.requires_grad)
            if p is not None:
                module._parameters[name] = made[id(p)]
