"""The tests' own machinery: mended interpreter, fake GPU, padding, random numbers."""

import numpy as np
import philox
import pytest
import torch
import triton
import triton.language as tl

from on_triton.support import gpu
from on_triton.support.padding import Padding


@triton.jit
def _scaled(x, factor):
    return x * factor


@triton.jit
def some_kernel(x_ptr, y_ptr, n_rows, n_cols, seed, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = (cols < n_cols) & (row < n_rows)
    x = tl.load(x_ptr + row * n_cols + cols, mask=mask, other=0.0)
    column = tl.where(cols[None, :] == 0, x[:, None], 0.0)  # [BLOCK, BLOCK]
    y = tl.dot(column, tl.trans(column), input_precision="ieee").to(x.dtype)
    y = _scaled(tl.max(y, axis=0), 3.0)
    y += tl.rand(seed, cols.to(tl.int64) + (row.to(tl.int64) << 33))
    tl.store(y_ptr + row * n_cols + cols, y, mask=mask)


def _expected(x, seed):
    products = (x[:, :, None].double() * x[:, None, :].double()).to(x.dtype)
    y = products.amax(1).float() * 3  # tl.max widens 16 bits
    offset = np.arange(x.shape[1]) + (np.arange(x.shape[0])[:, None] << 33)
    return (y + torch.from_numpy(philox.rand(seed, offset))).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_interpreted_and_compiled_in_turn(interpreted, dtype):
    x = torch.randn(3, 13).to(dtype)
    for seed in (7, 2**40 + 5):
        y = torch.empty_like(x)
        some_kernel[(3,)](x, y, 3, 13, seed, BLOCK=16)
        assert torch.equal(y, _expected(x, seed))
        with gpu.fake_gpu("sm_90") as launches:
            fake = torch.empty(3, 16, dtype=dtype)
            options = {"BLOCK": 16, "enable_fp_fusion": True}
            some_kernel[lambda meta: (meta["n_rows"],)](fake, fake, 3, 16, seed, **options)
        (launch,) = launches
        assert (launch.name, launch.grid) == ("some_kernel", (3,))
        assert "entry some_kernel" in gpu.resources(launch.compiled).assembly


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_padding_finds_reads_and_writes_outside(shape):
    padding = Padding()
    x = torch.randn(shape)
    y, z = padding(x, past_row=3), padding.empty(*shape, past_row=3)
    assert torch.equal(x, y)
    assert z.isnan().all()
    padding.check()
    for inside, written in ((y, 1.0), (z, torch.nan)):
        for offset in (-1, x.shape[-1]):
            outside = inside.as_strided((1,), (1,), inside.storage_offset() + offset)
            before = outside.clone()
            assert before.isnan() == (inside is y)
            outside.fill_(written)
            with pytest.raises(AssertionError, match="was written"):
                padding.check()
            outside.copy_(before)
    padding.check()
