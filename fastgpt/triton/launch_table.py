"""How each kernel is launched on each architecture: tile sizes, warps and pipeline stages.

One table, nothing tuned at run time. No row has been measured on a GPU yet: they are what compiles
without spills and under the shared memory's limit, chosen after published kernels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# The longest last dimension that an operation's kernels take: what one program holds.
WIDEST = {"layer_norm": 8192, "causal_attention": 128}


class Device(NamedTuple):
    """What a launcher must know of a GPU."""

    arch: str  # "sm_90", "gfx942"
    multiprocessors: int


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Device(arch, properties.multi_processor_count)


def device_of(x: Tensor) -> Device:
    """The GPU that holds x."""
    return _device(x.device.index)


def precision(x: Tensor) -> str:
    """How products of x's dtype are to be multiplied: float32 in full, unless torch allows TF32."""
    matmul = torch.backends.cuda.matmul
    if x.dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    # Since torch 2.9 the older switch raises where the newer one has been used.
    newer = getattr(matmul, "fp32_precision", None)
    return "tf32" if (matmul.allow_tf32 if newer is None else newer == "tf32") else "ieee"


# The architectures that share rows, by the shared memory a program gets: 163 KiB on sm_80, 227 on
# sm_90 and sm_100, 99 on sm_86, 64 on gfx942 and gfx1100.
_CLASSES = {
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_120": "sm_86",
    "sm_121": "sm_86",
    "sm_103": "sm_100",
    "gfx90a": "gfx942",
    "gfx950": "gfx942",
}


def class_of(arch: str) -> str:
    """The architecture whose rows this one shares."""
    return _CLASSES.get(arch, arch)


ANY = "*"
Launch = dict[str, int]


def _row(num_warps: int, num_stages: int = 1, **blocks: int) -> Launch:
    # Fused multiply-add is named because triton's default for it changes.
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **blocks}


# Kernel, then (architecture, dtype, size): the dtype is "half" for two bytes and "float" for four,
# the size what the kernel's launcher passes (a tile's width, the padded head_dim). ANY fits all, an
# architecture without a row too; the row that names most, from the left, is taken. Below sm_80 no
# kernel is launched. Some rows have maxnreg because ptxas, left alone, takes fewer registers for
# that kernel and spills.
TABLE: dict[str, dict[tuple[str, str, int | str], Launch]] = {
    # By the width's power of two.
    "layer_norm_fwd": {
        **{(ANY, ANY, 2**n): _row(4, ROWS=max(1, 2 ** (10 - n))) for n in range(2, 12)},
        (ANY, ANY, 4096): _row(8, ROWS=1),
        ("sm_80", "float", 4096): _row(8, ROWS=1, maxnreg=64),
        (ANY, ANY, 8192): _row(16, ROWS=1),
        # A warp of 64 threads: so that each still reads 16 bytes.
        **{("gfx942", ANY, 2**n): _row(2, ROWS=max(1, 2 ** (10 - n))) for n in range(2, 12)},
    },
    "layer_norm_bwd": {
        **{(ANY, ANY, 2**n): _row(8, ROWS=2 ** (12 - n)) for n in range(2, 13)},
        (ANY, ANY, 8192): _row(16, ROWS=1),
        # The registers that two programs leave each other: without a limit one is spilled.
        ("sm_100", "half", 1024): _row(8, ROWS=4, maxnreg=128),
    },
    "sum_rows": {(ANY, ANY, ANY): _row(4, BLOCK_M=64, BLOCK_N=32)},
    "bias_gelu_fwd": {(ANY, ANY, ANY): _row(4, ROWS=4, BLOCK=512)},
    "bias_gelu_bwd": {(ANY, ANY, ANY): _row(4, ROWS=4, BLOCK=512)},
    "dropout": {(ANY, ANY, ANY): _row(4, ROWS=4, BLOCK=256)},
    "embedding_fwd": {
        (ANY, ANY, ANY): _row(4, ROWS=4, BLOCK=256),
        ("gfx942", ANY, ANY): _row(2, ROWS=4, BLOCK=256),
    },
    "token_bwd": {
        (ANY, ANY, ANY): _row(1, ROWS=64, BLOCK=256),
        ("gfx942", "half", ANY): _row(1, ROWS=64, BLOCK=512),
    },
    "position_bwd": {
        (ANY, ANY, ANY): _row(4, ROWS=4, BLOCK=256),
        ("gfx942", ANY, ANY): _row(2, ROWS=4, BLOCK=256),
    },
    "cross_entropy_fwd": {(ANY, ANY, ANY): _row(8, BLOCK=4096)},
    "cross_entropy_bwd": {(ANY, ANY, ANY): _row(8, BLOCK=4096)},
    "linear": {
        (ANY, "half", ANY): _row(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, PARTS=4),
        ("sm_86", "half", ANY): _row(
            8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, PARTS=2
        ),
        ("gfx942", "half", ANY): _row(
            8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, PARTS=2
        ),
        (ANY, "float", ANY): _row(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, PARTS=1),
    },
    "linear_tf32": {
        (ANY, "float", ANY): _row(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, PARTS=4),
        ("sm_86", "float", ANY): _row(
            8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, PARTS=2
        ),
    },
    # Ragged: the rows of y start anywhere, and addresses take the registers of half the tile.
    "linear_tma": {
        (arch, "half", size): _row(
            8, stages, BLOCK_M=128, BLOCK_N=n, BLOCK_K=64, GROUP_M=8, PARTS=4
        )
        for arch in ("sm_90", "sm_100")
        for size, n, stages in ((ANY, 256, 3), ("ragged", 128, 4))
    },
    # By the rows, 1, 2, 4 or 16.
    "linear_rows": {
        (ANY, "half", ANY): _row(4, 2, BLOCK_N=4, BLOCK_K=1024),
        ("sm_80", "half", 1): _row(4, 2, BLOCK_N=4, BLOCK_K=1024, maxnreg=128),
        (ANY, "float", ANY): _row(4, 2, BLOCK_N=4, BLOCK_K=512),
        (ANY, "half", 16): _row(4, 4, BLOCK_N=16, BLOCK_K=256),
        (ANY, "float", 16): _row(4, 4, BLOCK_N=16, BLOCK_K=128),
        # With a norm the rows above spill there.
        ("gfx1100", ANY, 16): _row(8, 4, BLOCK_N=16, BLOCK_K=128),
    },
    # Of a weight that lies column by column: so many columns are a sector of 32 bytes.
    "linear_columns": {
        (ANY, "half", ANY): _row(4, 4, BLOCK_N=16, BLOCK_K=256),
        (ANY, "float", ANY): _row(4, 4, BLOCK_N=8, BLOCK_K=256),
        (ANY, "float", 16): _row(4, 4, BLOCK_N=16, BLOCK_K=128),
        ("sm_80", "float", 16): _row(4, 4, BLOCK_N=16, BLOCK_K=128, maxnreg=255),
        ("gfx1100", ANY, 16): _row(8, 4, BLOCK_N=16, BLOCK_K=128),
    },
    # By the rows likewise; blocks of W of which each thread reads 16 bytes.
    "int8_rows": {
        (ANY, "half", ANY): _row(4, 2, BLOCK_N=4, BLOCK_K=1024),
        (ANY, "float", ANY): _row(4, 2, BLOCK_N=4, BLOCK_K=512),
        (ANY, "half", 16): _row(4, 4, BLOCK_N=16, BLOCK_K=256),
        (ANY, "float", 16): _row(8, 4, BLOCK_N=16, BLOCK_K=128),
        **{("gfx942", "float", n): _row(4, 2, BLOCK_N=4, BLOCK_K=1024) for n in (1, 2, 4)},
    },
    "int4_rows": {
        (ANY, ANY, ANY): _row(4, 2, BLOCK_N=4, BLOCK_K=1024),
        (ANY, "half", 16): _row(4, 4, BLOCK_N=16, BLOCK_K=256),
        # With a fourth stage triton 3.6 spills.
        ("sm_100", "half", 16): _row(4, 3, BLOCK_N=16, BLOCK_K=256),
        (ANY, "float", 16): _row(8, 4, BLOCK_N=16, BLOCK_K=128),
        **{("gfx942", ANY, n): _row(4, 2, BLOCK_N=4, BLOCK_K=2048) for n in (1, 2, 4)},
    },
    # "narrow" heads are 16, 32 or 64 wide; "dropout" is the same with dropout; "wide" any other.
    # gfx1100 keeps the factors of a product whole in its 256 registers. The gradients of wide
    # heads spill there in any tile, and in float32 those of keys with dropout: these spill least.
    "causal_attention_fwd": {
        (ANY, "half", ANY): _row(8, 3, BLOCK_M=128, BLOCK_N=64),
        (ANY, "half", "wide"): _row(8, 2, BLOCK_M=64, BLOCK_N=64),
        ("sm_100", "half", "wide"): _row(8, 2, BLOCK_M=64, BLOCK_N=32),
        ("gfx942", "half", ANY): _row(4, BLOCK_M=128, BLOCK_N=64),
        ("gfx1100", "half", ANY): _row(8, BLOCK_M=64, BLOCK_N=32),
        ("gfx1100", "half", "wide"): _row(8, BLOCK_M=16, BLOCK_N=16),
        ("gfx1100", "float", ANY): _row(8, BLOCK_M=16, BLOCK_N=16),
        (ANY, "float", ANY): _row(8, 2, BLOCK_M=64, BLOCK_N=32),
        (ANY, "float", "wide"): _row(4, 2, BLOCK_M=16, BLOCK_N=16),
        # With a second stage triton takes 80 registers for heads 128 wide and spills.
        ("sm_86", "float", "wide"): _row(4, BLOCK_M=16, BLOCK_N=16),
    },
    "causal_attention_bwd_dq": {
        (ANY, "half", ANY): _row(8, 2, BLOCK_M=128, BLOCK_N=64),
        ("sm_80", "half", "dropout"): _row(8, 2, BLOCK_M=64, BLOCK_N=64),
        ("sm_86", "half", "dropout"): _row(8, 2, BLOCK_M=64, BLOCK_N=64),
        (ANY, "half", "wide"): _row(8, 2, BLOCK_M=64, BLOCK_N=64),
        ("sm_90", "half", "wide"): _row(8, 2, BLOCK_M=64, BLOCK_N=32),
        ("gfx942", "half", ANY): _row(4, BLOCK_M=64, BLOCK_N=64),
        ("gfx1100", "half", ANY): _row(8, BLOCK_M=32, BLOCK_N=32),
        ("gfx1100", "half", "wide"): _row(8, BLOCK_M=16, BLOCK_N=16),
        ("gfx1100", "float", ANY): _row(8, BLOCK_M=16, BLOCK_N=16),
        (ANY, "float", ANY): _row(8, 2, BLOCK_M=64, BLOCK_N=32),
        # Left alone, triton 3.6 takes 80 registers and spills; TF32 does with 96.
        ("sm_80", "float", "dropout"): _row(8, 2, BLOCK_M=32, BLOCK_N=32, maxnreg=128),
        ("sm_100", "float", "dropout"): _row(8, 2, BLOCK_M=32, BLOCK_N=32),
        (ANY, "float", "wide"): _row(8, 2, BLOCK_M=32, BLOCK_N=16),
        # With twice the rows TF32 spills.
        **{
            (arch, "float", "wide"): _row(8, 2, BLOCK_M=16, BLOCK_N=16)
            for arch in ("sm_80", "sm_86", "sm_100")
        },
    },
    "causal_attention_bwd_dkdv": {
        (ANY, "half", ANY): _row(8, 2, BLOCK_M=32, BLOCK_N=128),
        ("sm_90", "half", "narrow"): _row(8, 2, BLOCK_M=64, BLOCK_N=128),
        ("sm_100", "half", "narrow"): _row(8, 2, BLOCK_M=64, BLOCK_N=128),
        ("sm_100", "half", "dropout"): _row(8, 2, BLOCK_M=64, BLOCK_N=128),
        ("sm_86", "half", ANY): _row(4, 2, BLOCK_M=32, BLOCK_N=64),
        (ANY, "half", "wide"): _row(8, 2, BLOCK_M=32, BLOCK_N=64),
        ("sm_80", "half", "wide"): _row(8, BLOCK_M=32, BLOCK_N=64),
        ("sm_90", "half", "wide"): _row(4, BLOCK_M=32, BLOCK_N=32),
        ("sm_86", "half", "wide"): _row(8, 2, BLOCK_M=32, BLOCK_N=64),
        ("sm_100", "half", "wide"): _row(4, BLOCK_M=32, BLOCK_N=32),
        ("gfx942", "half", ANY): _row(4, BLOCK_M=32, BLOCK_N=64),
        ("gfx942", "half", "wide"): _row(4, BLOCK_M=32, BLOCK_N=32),
        ("gfx1100", "half", ANY): _row(8, BLOCK_M=16, BLOCK_N=32),
        ("gfx1100", "half", "dropout"): _row(4, BLOCK_M=16, BLOCK_N=16),
        ("gfx1100", "half", "wide"): _row(8, BLOCK_M=16, BLOCK_N=16),
        ("gfx1100", "float", ANY): _row(8, BLOCK_M=16, BLOCK_N=16),
        (ANY, "float", ANY): _row(4, 2, BLOCK_M=32, BLOCK_N=32),
        ("sm_80", "float", "dropout"): _row(4, 2, BLOCK_M=16, BLOCK_N=32),
        ("sm_90", "float", "narrow"): _row(4, 2, BLOCK_M=32, BLOCK_N=32, maxnreg=255),
        (ANY, "float", "wide"): _row(16, 2, BLOCK_M=16, BLOCK_N=16),
        ("sm_80", "float", "wide"): _row(4, 2, BLOCK_M=16, BLOCK_N=16),
        ("sm_100", "float", "wide"): _row(8, BLOCK_M=16, BLOCK_N=16),
        ("gfx942", "float", "wide"): _row(8, BLOCK_M=16, BLOCK_N=16),
    },
    "decode_attention_split": {(ANY, ANY, ANY): _row(4, BLOCK_N=64)},
    "decode_attention_join": {(ANY, ANY, ANY): _row(4)},
    # By the rows likewise: what differs from the tiles of products of few rows. The limit leaves so
    # many programs a multiprocessor the registers to run at once; with 16 rows larger tiles spill.
    "decode_layer": {
        (ANY, ANY, ANY): _row(4, 2, PROGRAMS=3, maxnreg=168),
        (ANY, "half", 16): _row(4, 4, PROGRAMS=2, maxnreg=255, BLOCK_K=128),
        (ANY, "float", 16): _row(4, 3, PROGRAMS=2, maxnreg=255, BLOCK_N=8, BLOCK_K=64),
    },
    "begin_step": {(ANY, ANY, ANY): _row(4)},
    "cache_append": {(ANY, ANY, ANY): _row(4, HEADS=8)},
}


def launch(kernel: str, x: Tensor, size: int | str = ANY) -> Launch:
    """The keyword arguments with which to launch a kernel on x's device and dtype.

    Raises:
        KeyError: the table has no row for it.
    """
    return lookup(kernel, device_of(x).arch, x.dtype.itemsize, size)


@functools.cache
def lookup(kernel: str, arch: str, itemsize: int, size: int | str = ANY) -> Launch:
    """The same for an architecture and an element's size in bytes."""
    rows = TABLE[kernel]
    dtype = "half" if itemsize == 2 else "float"
    for a in (class_of(arch), ANY):
        for d in (dtype, ANY):
            for s in (size, ANY):
                if (a, d, s) in rows:
                    return rows[a, d, s]
    raise KeyError(f"settings of {kernel} have no row for {arch}, {dtype}, size {size}")
