"""What PyTorch is doing around a call, and every other private name of torch that fastgpt uses.

None of them has a public form. What a module keeps in its own dictionaries (``_parameters``,
``_modules``, its hooks) is read elsewhere too: pickles have held those names for years.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module
from torch.utils import _python_dispatch

_TELLS_EXPORT = hasattr(torch.compiler, "is_exporting")

# What tells whether something watches or transforms a call.
_WATCHES = {
    "torch": ("_C._are_functorch_transforms_active", "_C._get_tracing_state"),
    "torch.autograd.forward_ad": ("_current_level",),
    "torch.utils._python_dispatch": ("_len_torch_dispatch_stack",),
    "torch.nn.modules.module": (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    ),
}


def _lacking() -> str | None:
    for at, names in _WATCHES.items():
        for name in names:
            try:
                attrgetter(name)(importlib.import_module(at))
            except AttributeError:
                return f"torch {torch.__version__} has no {at}.{name}, by which watchers are seen"
    return None


# Why this torch does not tell what watches a call. Then every call counts as watched, and all runs
# on PyTorch's own operations.
lacking = _lacking()


def transformed() -> bool:
    """Whether a functorch transform or forward-mode differentiation is at work."""
    return (
        lacking is not None
        # Which torch.compile answers rightly, as it does not for functorch's own stack.
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def recorded() -> bool:
    """Whether a dispatch mode (fake tensors, FLOP counters) or torch.jit.trace sees what runs."""
    return (
        lacking is not None
        or _python_dispatch._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def exporting() -> bool:
    """Whether torch.export is recording a graph, which must load where fastgpt is not imported.

    Before torch 2.7 a strict export can't be told from torch.compile.
    """
    if _TELLS_EXPORT:
        return torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def has_global_hooks() -> bool:
    """Whether a hook listens to the calls of every module."""
    return lacking is not None or bool(
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or module._global_backward_hooks
        or module._global_backward_pre_hooks
    )


_stance = contextlib.ExitStack()
_eager = 0  # how many callers are inside `eager` now: torch has one stance for all threads
_entering = threading.Lock()


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Inside, what torch.compile has compiled runs as it was before, in all threads. Not so before
    torch 2.6, which cannot.
    """
    global _eager
    with _entering:
        if _eager == 0 and hasattr(torch.compiler, "set_stance"):
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _eager += 1
    try:
        yield
    finally:
        with _entering:
            _eager -= 1
            if _eager == 0:
                _stance.close()


def is_compile_error(error: Exception) -> bool:
    """Whether torch.compile raised this. Imports no compiler: without one it has not."""
    raised = getattr(sys.modules.get("torch._dynamo.exc"), "TorchDynamoException", ())
    return isinstance(error, raised)


def sdpa_kernel(
    name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float
) -> Tensor:
    """Causal attention by the kernel "flash" or "efficient" of ``scaled_dot_product_attention``,
    which has a gradient too; dropout draws from the GPU's generator. q, k, v: [B, H, T, D] on a GPU
    that has it, as ``torch.backends.cuda`` tells.
    """
    aten = torch.ops.aten
    out: Tensor
    if name == "flash":
        out = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, True, scale=scale)[0]
    else:
        rest = (None, True, dropout_p, True)  # no bias, a log-sum-exp for backward, causal
        out = aten._scaled_dot_product_efficient_attention(q, k, v, *rest, scale=scale)[0]
    return out


def product_eps(x: Tensor) -> float:
    """The distance from 1 to the next number of the format that products round x's to: its dtype,
    or a narrower one, which torch's switches may allow for float32.
    """
    if x.dtype is not torch.float32:
        return torch.finfo(x.dtype).eps
    matmul = getattr(torch.backends.cuda if x.is_cuda else torch.backends.mkldnn, "matmul", None)
    # Since torch 2.9 the older switch raises where the newer one has been used.
    allowed = getattr(matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()
    tf32, bf16 = 2.0**-10, torch.finfo(torch.bfloat16).eps
    found = {"tf32": tf32, "high": tf32, "bf16": bf16, "medium": bf16}
    return found.get(allowed, torch.finfo(torch.float32).eps)


def forget_workspaces() -> None:
    """Has the GPU's libraries take new scratch memory where they next need some: what a CUDA graph
    that is captured next writes to lies in its own memory then. Nothing where torch has none.
    """
    forget = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if forget is not None:
        forget()


class PackedOneDNN:
    """oneDNN's product of x with a weight, [n_out, n_in], packed once, plus a bias, [n_out].

    Raises AttributeError if torch has no such operation. Only the benchmarks ask for it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = bias

    def __call__(self, x: Tensor) -> Any:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def onednn_has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor; False if torch does not tell."""
    tells = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return tells is not None and bool(tells())


# How often a tensor was changed, as far as PyTorch counts it.
version = attrgetter("_version")
