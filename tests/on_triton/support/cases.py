"""What each operation's test file hands to test_compiled.py: its launchers, called as in use.

A file test_<op>.py lists them in `CASES`, a dict of Case by name; test_compiled.py names the op.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE_IDS = ["float32", "float16", "bfloat16"]


class Case(NamedTuple):
    # Makes tensors of the dtype with `empty` (they hold no memory) and calls the launcher.
    run: Callable[[torch.dtype], Any]
    # Kernels that must use the tensor cores in 16-bit dtypes, by name.
    matrix: tuple[str, ...] = ()
    # Kernels that must read global memory 16 bytes at a time.
    wide: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    archs: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")


def empty(dtype, *shape):
    """A tensor of the fake GPU's."""
    return torch.empty(shape, dtype=dtype)
