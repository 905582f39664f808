"""What a CUDA graph of a function would hold, found on a GPU that is not there.

`captured(run, launches)` runs it twice on fake CUDA tensors, as a capture does: to compile the
kernels, and to record. It tells what each launch is, and what a graph must not hold.
"""

from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that launch nothing, beside views.
_NOTHING = {"prim::device", "promote_types", "empty", "new_empty", "empty_like", "empty_strided"}
_NOTHING |= {"new_empty_strided", "detach", "lift_fresh"}
# Operations that wait for the GPU.
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}
# Operations that PyTorch hands to the vendor, with a workspace whose address a graph would keep.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "matmul", "_addmm"}


class Captured(NamedTuple):
    launches: list[str]  # our kernels by name, PyTorch's operations as "aten.<name>"
    faults: list[str]


class _Copies(TorchFunctionMode):
    """Tensor.copy_ of a torch without CUDA asks for a guard of the GPU, the operation does not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.ops.aten.copy_ if func is torch.Tensor.copy_ else func
        return func(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):
    def __init__(self, launches):
        super().__init__()
        self._launches, self._seen, self.order, self.faults = launches, 0, [], []

    def look(self):
        """Takes note of what kernels of ours were launched since the last look."""
        self.order += [launch.name for launch in self._launches[self._seen :]]
        self._seen = len(self._launches)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.look()
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in _WAITS:
            self.faults.append(f"{name} waits for the GPU")
        if name in _PRODUCTS or "dot_product" in name:
            self.faults.append(f"{name} is the vendor's")
        self._check_devices(name, args)
        result = func(*args, **(kwargs or {}))
        self._check_devices(name, result)
        if name not in _NOTHING and not func.is_view:
            self.order.append(f"aten.{name}")
        return result

    def _check_devices(self, name, tensors):
        self.faults += [
            f"{name} touches memory of {t.device.type}"
            for t in _tensors(tensors)
            if t.device.type != "cuda"
        ]


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)


def captured(run, launches):
    """What run() launches inside `fake_gpu`, which gave `launches`."""
    faults = []
    for _ in range(2):
        warm = {id(launch.compiled) for launch in launches}
        launches.clear()
        with _Watch(launches) as watch, _Copies():
            try:
                run()
            except RuntimeError:  # of what cannot be done with fake tensors
                if not watch.faults:
                    raise
                return Captured(watch.order, watch.faults)
        watch.look()
    for launch in launches:
        if id(launch.compiled) not in warm:
            faults.append(f"{launch.name} was not compiled in the warm-up")
    return Captured(watch.order, watch.faults + faults)
