"""Which modules do just what their class says, so that fused code may stand in for calling them,
and what stands in the way of the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from torch import nn

from fastgpt.torch_state import has_global_hooks

M = TypeVar("M", bound=nn.Module)
_CALL = nn.Module.__call__
# The forward of each class that fused code knows.
KNOWN: dict[type[nn.Module], Any] = {
    cls: cls.forward for cls in (nn.Linear, nn.Embedding, nn.Sequential, nn.Dropout, nn.Identity)
}
_HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}


class Obstacle(NamedTuple):
    """A piece that keeps what holds it from running fused."""

    path: str  # from the module that was asked; empty for that module itself
    reason: str

    def below(self, path: str) -> Obstacle:
        """The same, seen from the module that holds the one asked under this path."""
        return Obstacle(f"{path}.{self.path}" if self.path else path, self.reason)


def fusable_class(cls: type[M]) -> type[M]:
    """Class decorator: remembers the class's forward, so that one set later is seen."""
    KNOWN[cls] = cls.forward
    return cls


def is_unmodified(module: Any, cls: type[nn.Module]) -> bool:
    """Whether nothing is replaced in this module and nothing listens to it.

    Subclasses (parametrisations, FSDP, quantised layers), hooks, a forward set on the instance or
    the class and a compiled call all say no. Its children are not looked at.
    """
    return alone_unmodified(module, cls) and classes_unmodified()


def classes_unmodified() -> bool:
    """Whether no known class has another forward or call, and no hook listens to every module."""
    for cls, forward in KNOWN.items():
        if cls.forward is not forward or cls.__call__ is not _CALL:
            return False
    return not has_global_hooks()


def alone_unmodified(module: Any, cls: type[nn.Module]) -> bool:
    """``is_unmodified`` but for what ``classes_unmodified`` tells of all modules at once.

    A small model's arithmetic takes as long as a look at each of its modules, so this one is short.
    """
    if type(module) is not cls:
        return False
    held = module.__dict__
    return not (
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "forward" in held
        or held.get("_compiled_call_impl") is not None
    )


def modification(module: Any, cls: type[nn.Module]) -> str:
    """What ``is_unmodified`` objects to, for a reader."""
    if type(module) is not cls:
        return f"{type(module).__name__} in place of {cls.__name__}"
    for name, kind in _HOOKS.items():
        if getattr(module, name):
            return kind
    if has_global_hooks():
        return "a hook on every module"
    if module._compiled_call_impl is not None:
        return "compiled by itself"
    return "a forward of its own"


def obstacle(module: Any, cls: type[nn.Module], path: str) -> Obstacle | None:
    """What stands in the way of this piece, None if nothing does."""
    return None if is_unmodified(module, cls) else Obstacle(path, modification(module, cls))


def is_unmodified_linear(module: Any) -> bool:
    """Whether a module is an unmodified nn.Linear with a weight and a bias of its own."""
    return is_unmodified(module, nn.Linear) and has_own_parameters(module)


def has_own_parameters(linear: nn.Module) -> bool:
    """Whether a linear layer's weight and bias are its parameters; a missing key means one was
    replaced by a plain tensor.
    """
    held = linear._parameters
    return "weight" in held and "bias" in held


def drop_probability(dropout: Any) -> float | None:
    """The probability with which this dropout module drops an element of a call, 0 in evaluation;
    None if it is a modified module, or one that draws PyTorch's mask rather than ours.
    """
    cls = type(dropout)
    if cls not in KNOWN or not issubclass(cls, (nn.Dropout, nn.Identity)):
        return None
    if not is_unmodified(dropout, cls):
        return None
    p = dropout.p if dropout.training and cls is not nn.Identity else 0.0
    return None if p and (cls is nn.Dropout or dropout.inplace) else p


def dropout_obstacle(dropout: Any, path: str) -> Obstacle:
    """What makes ``drop_probability`` None."""
    cls = type(dropout)
    if cls not in KNOWN or not issubclass(cls, nn.Dropout):
        return Obstacle(path, f"{cls.__name__} in place of Dropout")
    if is_unmodified(dropout, cls):
        return Obstacle(path, "a dropout that draws PyTorch's mask")
    return Obstacle(path, modification(dropout, cls))


def drops_nothing(dropout: Any) -> bool:
    """Whether this dropout module passes its input through and draws no random number."""
    return drop_probability(dropout) == 0
