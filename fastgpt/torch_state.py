"""What PyTorch is doing around a call. The private functions of torch that we call are here."""

from __future__ import annotations

import torch
from torch.nn.modules import module
from torch.utils._python_dispatch import _len_torch_dispatch_stack

_TELLS_EXPORT = hasattr(torch.compiler, "is_exporting")


def transformed() -> bool:
    """Whether a functorch transform or forward-mode differentiation is at work."""
    return (
        # Which torch.compile answers rightly, as it does not for functorch's own stack.
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def recorded() -> bool:
    """Whether a dispatch mode (fake tensors, FLOP counters) or torch.jit.trace sees what runs."""
    return _len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None


def exporting() -> bool:
    """Whether torch.export is recording a graph, which must load where fastgpt is not imported.

    Before torch 2.7 a strict export can't be told from torch.compile.
    """
    if _TELLS_EXPORT:
        return torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def has_global_hooks() -> bool:
    """Whether a hook listens to the calls of every module."""
    return bool(
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or module._global_backward_hooks
        or module._global_backward_pre_hooks
    )
