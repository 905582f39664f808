"""What a function makes the host wait for, found on a GPU that is not there.

Tensors of `fake_gpu` are all on that GPU here, though they say that they are on the CPU: a torch
without CUDA keeps no gradients of those that say otherwise. So a device given as an object is the
GPU, and one given by its name, "cpu", is the host.
"""

from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that wait for the GPU. Those whose result's shape depends on numbers, such as nonzero,
# raise of themselves with fake tensors.
_WAITS = {"_local_scalar_dense", "equal"}
_TO_HOST = {"cpu", "numpy"}
_FROM_HOST = {"tensor", "as_tensor"}


class Found(NamedTuple):
    waits: list[str]
    copies: list[str]  # to the host, which nobody waits for


class _Copied:
    """What such a copy gives: numbers, once somebody has waited for its event."""

    def __init__(self, source):
        self._shape = source.shape

    def tolist(self):
        return [0] * self._shape[0]


class _Operations(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in _WAITS:
            self._found.waits.append(f"{name} waits for the GPU")
            return 1  # a fake tensor has no number
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self._found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        named = "cpu" in [a for a in (*args[1:], kwargs.get("device")) if isinstance(a, str)]
        if name in _TO_HOST or (name == "to" and named):
            if kwargs.get("non_blocking"):
                self._found.copies.append(name)
                return _Copied(args[0])
            self._found.waits.append(f"{name} copies to the host")
        if name in _FROM_HOST and isinstance(kwargs.get("device"), torch.device):
            self._found.waits.append(f"{name} copies from the host")
        return func(*args, **kwargs)


def unread(run):
    """What run() waits for inside `fake_gpu`, and what it leaves on the host unread."""
    found = Found([], [])
    with _Operations(found), _Calls(found):
        run()
    return found
