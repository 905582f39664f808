"""What each operation's test file hands to test_compiled.py: its launchers, called as in use.

A file test_<op>.py lists them in `CASES`, a dict of Case by name; test_compiled.py names the op.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from on_triton.support import gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE_IDS = ["float32", "float16", "bfloat16"]
# TF32 is float32 whose products PyTorch's switch lets round; AMD's have none.
MODES = {"tf32": torch.float32, **dict(zip(DTYPE_IDS, DTYPES, strict=True))}
HALF = ("float16", "bfloat16")


class Case(NamedTuple):
    # Makes tensors of the dtype with `empty` (they hold no memory) and calls the launcher.
    run: Callable[[torch.dtype], Any]
    # Kernels that must use the tensor cores in 16-bit dtypes, by name.
    matrix: tuple[str, ...] = ()
    # Kernels that must read global memory 16 bytes at a time.
    wide: tuple[str, ...] = ()
    # Those of `modes` and `archs` that `make test` compiles; no archs: one of each family.
    sample: tuple[str, ...] = ("bfloat16",)
    sample_archs: tuple[str, ...] = ()
    # All of MODES and gpu.ARCHS in which these kernels are launched.
    modes: tuple[str, ...] = tuple(DTYPE_IDS)
    archs: tuple[str, ...] = tuple(gpu.ARCHS)
    # Kernels and modes that spill on gfx1100 in any tile: launch_table.py says why.
    spills: tuple[tuple[str, str], ...] = ()

    def launches(self, arch: str, mode: str) -> list[gpu.Launch]:
        """What it launches, compiled."""
        torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
        try:
            with gpu.fake_gpu(arch) as launches:
                self.run(MODES[mode])
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        return launches


def empty(dtype, *shape):
    """A tensor of the fake GPU's."""
    return torch.empty(shape, dtype=dtype)
