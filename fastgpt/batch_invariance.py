"""Whether a row has the same bits whatever runs beside it: asked for by ``batch_invariant``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from fastgpt import torch_state

_asked: ContextVar[bool] = ContextVar("fastgpt_batch_invariant", default=False)


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside, in this thread or task (and threads that start inside where Python hands them the
    context, as 3.14 without a GIL does), a token's logits do not depend on what else is in its
    pass: neither on other texts, their number and lengths, nor on whether the tokens before it come
    together or one by one. So generation from cached keys and values equals the full pass bit for
    bit, as does any number of threads.

    For passes without gradients on the CPU, in every precision that the C++ kernels take. Sums run
    in the order that few rows have: cached generation costs what it does outside, long prompts
    take longer (python -m benchmarks invariance tells). What torch.compile has compiled runs as if
    it were not. A module that is not fastgpt's own, such as a LoRA layer, computes as it always
    does.

    Raises (from what is called inside):
        BackendError: an operation would run as PyTorch's own, whose sums follow the size of the
            batch: on a GPU, on the reference, with gradients, under autocast in a modified model,
            in a dtype that the kernels do not take, or with a row-major weight of so many
            inputs, 400,000 and more, that a row has no room in a product's scratch memory.
    """
    token = _asked.set(True)
    try:
        with torch_state.eager():
            yield
    finally:
        _asked.reset(token)


def asked() -> bool:
    """Whether the caller is inside ``batch_invariant``."""
    return _asked.get()
