"""Where attention and products run on kernels of our own, and where on the vendor's.

One table for each, read at every call and never tuned at run time. A row says whether a GPU has
been measured and where its choice comes from; none has been measured yet, so all of them are
what published figures and arithmetic suggest. `python -m benchmarks.gpu` measures.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.triton import launch_table
from fastgpt.triton.launch_table import ANY


class Choice(NamedTuple):
    """What runs, and why."""

    # "own"; of attention "sdpa", PyTorch's operation as it chooses itself, or "flash" or
    # "efficient", its kernel of that name; of products "vendor", cuBLAS or hipBLASLt through torch.
    implementation: str
    measured: bool
    source: str


def _suggested(implementation: str, source: str) -> Choice:
    return Choice(implementation, False, source)


_FLASH_3 = "FlashAttention-3 (arXiv 2407.08608), figures 5 and 6: cuDNN ahead of Triton on an H100"
_FLASH_2 = "FlashAttention-2 (arXiv 2307.08691), 4.1: 1.3 to 2.5 times Triton's on an A100"
_PLANS = "cuDNN plans each new length again, for a good part of a second"
_OFF = "pytorch #166397: AMD's own kernels are experimental on gfx1100, and off by default"
_NO_SDPA = "SDPA's is_causal aligns queries with the first keys"
_RANDOM = "arithmetic: flash attention has 16 random numbers of 7 rounds of Philox, ours 4 of 10"
_UNKNOWN = "nothing is known of AMD's own kernels with dropout"
_BITS = "SDPA's backward adds atomically, ours gives the same bits twice"
_TENSOR_CORES = "SDPA's efficient kernel splits float32 for the tensor cores, ours does not"
_EPILOGUE = "arithmetic: GELU in the epilogue saves reading and writing the product once"
_FEW_ROWS = "arithmetic: bound by one read of the weights, for which vendors' kernels tile badly"
_PRODUCTS = "design.md: a plain product is what cuBLAS is best at"

# (architecture, dtype, shape). The shape of attention is "long" (as many keys as queries, a length
# as training has it, no dropout), "square" (any other length), "dropout" (both, with dropout),
# "repeatable" (all three, with torch.use_deterministic_algorithms) or "other".
ATTENTION: dict[tuple[str, str, str], Choice] = {
    **{
        (arch, "half", shape): _suggested("sdpa", source)
        for arch, source in (
            ("sm_80", _FLASH_2),
            ("sm_86", _FLASH_2),
            ("gfx942", "PyTorch's build carries AMD's own kernels"),
        )
        for shape in ("long", "square")
    },
    **{("gfx1100", "half", shape): _suggested("own", _OFF) for shape in ("long", "square")},
    **{(arch, "half", "long"): _suggested("sdpa", _FLASH_3) for arch in ("sm_90", "sm_100")},
    **{(arch, "half", "square"): _suggested("flash", _PLANS) for arch in ("sm_90", "sm_100")},
    **{
        (arch, "float", shape): _suggested(implementation, source)
        for arch, implementation, source in (
            ("gfx942", "own", "AMD's matrix cores multiply float32"),
            ("gfx1100", "own", _OFF),
            (ANY, "sdpa", _TENSOR_CORES),
        )
        for shape in ("long", "square")
    },
    **{
        (arch, dtype, "dropout"): _suggested(implementation, source)
        for arch in ("sm_80", "sm_86", "sm_90", "sm_100")
        for dtype, implementation, source in (
            ("half", "flash", _RANDOM),
            ("float", "efficient", _TENSOR_CORES),
        )
    },
    (ANY, ANY, "dropout"): _suggested("own", _UNKNOWN),
    (ANY, ANY, "repeatable"): _suggested("own", _BITS),
    (ANY, ANY, "other"): _suggested("own", _NO_SDPA),
}

# The shape of a product is "few" (16 rows or less), "gelu" (a bias and GELU behind it, and rows
# enough for a tile on each multiprocessor) or "plain".
PRODUCTS: dict[tuple[str, str, str], Choice] = {
    (ANY, ANY, "few"): _suggested("own", _FEW_ROWS),
    (ANY, "half", "gelu"): _suggested("own", _EPILOGUE),
    ("gfx942", "half", "gelu"): _suggested("vendor", _PRODUCTS),
    ("gfx1100", "half", "gelu"): _suggested("vendor", _PRODUCTS),
    (ANY, "float", "gelu"): _suggested("vendor", _PRODUCTS),
    (ANY, ANY, "plain"): _suggested("vendor", _PRODUCTS),
}

FEW_ROWS = 16
# 12 tiles of 128 x 256 abreast, as in GPT-2 124M, give each of an H200's 132 multiprocessors one.
MANY_ROWS = 11 * 128
# A length that cuDNN is worth a plan for.
LONG, MULTIPLE = 512, 128


@functools.cache
def attention(
    arch: str,
    itemsize: int,
    queries: int,
    keys: int,
    dropout: bool = False,
    repeatable: bool = False,
) -> Choice:
    """What runs causal attention.

    Args:
        arch: "sm_90", "gfx942" and so on, as ``launch_table.device_of`` says it.
        itemsize: of the dtype, in bytes.
        queries: how many there are.
        keys: how many there are.
        dropout: whether weights are dropped.
        repeatable: whether the same call must give the same bits.
    """
    if queries != keys:
        shape = "other"
    elif repeatable:
        shape = "repeatable"
    elif dropout:
        shape = "dropout"
    else:
        shape = "long" if queries >= LONG and queries % MULTIPLE == 0 else "square"
    return _row(ATTENTION, arch, itemsize, shape)


def product(arch: str, itemsize: int, rows: int, gelu: bool = False) -> Choice:
    """What runs act(x W^T + b) on so many rows of x. arch, itemsize: as for attention."""
    shape = "few" if rows <= FEW_ROWS else "gelu" if gelu and rows >= MANY_ROWS else "plain"
    return _row(PRODUCTS, arch, itemsize, shape)


def vendor_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> str | None:
    """ "sdpa", "flash" or "efficient", what of PyTorch's runs causal attention of q [B, H, T, D]
    and k and v [B, H, S, D]; None for our own kernels.
    """
    repeatable = torch.are_deterministic_algorithms_enabled()
    sizes = q.element_size(), q.shape[2], k.shape[2]
    choice = attention(launch_table.device_of(q).arch, *sizes, dropout_p > 0, repeatable)
    name = choice.implementation
    if name in ("flash", "efficient") and not _takes(name, q, k, v, dropout_p):
        # With dropout PyTorch's next choice may be a block of queries x keys.
        name = "own" if dropout_p > 0 else "sdpa"
    return None if name == "own" else name


def _takes(name: str, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> bool:
    """Whether PyTorch's kernel of that name runs here, nobody has switched it off, and it takes
    these as they are: it reads 16 bytes at a time. Switches nothing itself, as PyTorch's switches
    are those of all threads.
    """
    cuda = torch.backends.cuda
    can = cuda.can_use_flash_attention if name == "flash" else cuda.can_use_efficient_attention
    aligned = all(
        n * t.element_size() % 16 == 0
        for t in (q, k, v)
        for n in (t.shape[3], t.storage_offset(), *t.stride()[:3])
    )
    fits = aligned and dropout_p < 1 and q.numel() > 0
    return fits and can(cuda.SDPAParams(q, k, v, None, dropout_p, True, False))


def own_product(x: Tensor, rows: int, gelu: bool = False) -> bool:
    """Whether our own kernels run act(x W^T + b) on so many rows of x."""
    choice = product(launch_table.device_of(x).arch, x.element_size(), rows, gelu)
    return choice.implementation == "own"


def _row(table: dict[tuple[str, str, str], Choice], arch: str, itemsize: int, shape: str) -> Choice:
    """The row for it, or the one for ANY architecture or dtype."""
    dtype = "half" if itemsize == 2 else "float"
    for a in (launch_table.class_of(arch), ANY):
        for d in (dtype, ANY):
            if (a, d, shape) in table:
                return table[a, d, shape]
    return _suggested("own", f"no row for {arch}: nothing is known of the vendor's kernels there")
