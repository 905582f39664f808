"""Which modules do just what their class says, so that fused code may stand in for calling them."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from fastgpt.torch_state import has_global_hooks

M = TypeVar("M", bound=nn.Module)
_CALL = nn.Module.__call__
# The forward of each class that fused code knows.
KNOWN: dict[type[nn.Module], Any] = {
    cls: cls.forward for cls in (nn.Linear, nn.Embedding, nn.Sequential, nn.Dropout, nn.Identity)
}


def known(cls: type[M]) -> type[M]:
    """Class decorator: remembers the class's forward, so that one set later is seen."""
    KNOWN[cls] = cls.forward
    return cls


def plain(module: Any, cls: type[nn.Module]) -> bool:
    """Whether nothing is replaced in this module and nothing listens to it.

    Subclasses (parametrisations, FSDP, quantised layers), hooks, a forward set on the instance or
    the class and a compiled call all say no. Its children are not looked at.
    """
    return (
        type(module) is cls
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and cls.forward is KNOWN[cls]
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and cls.__call__ is _CALL
        and not has_global_hooks()
    )


def plain_linear(module: Any) -> bool:
    """Whether a module is plainly an nn.Linear with a weight and a bias of its own.

    Without the key somebody has put another tensor in the parameter's place.
    """
    return plain(module, nn.Linear) and module._parameters.keys() >= {"weight", "bias"}


def drop_probability(dropout: Any) -> float | None:
    """The probability with which this dropout module drops an element of a call, 0 in evaluation;
    None where it is not plainly one of ours. Another draws PyTorch's mask, as it would by itself.
    """
    if isinstance(dropout, nn.Dropout) and type(dropout) in KNOWN:
        if not plain(dropout, type(dropout)):
            return None
        p = dropout.p if dropout.training else 0.0
        return None if p and (type(dropout) is nn.Dropout or dropout.inplace) else p
    return 0.0 if plain(dropout, nn.Identity) else None


def drops_nothing(dropout: Any) -> bool:
    """Whether this dropout module passes its input through and draws no random number."""
    return drop_probability(dropout) == 0
