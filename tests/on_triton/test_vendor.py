from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import dispatch, ops
from fastgpt.triton import vendor
from on_triton.support import gpu

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arch", gpu.ARCHS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_shape_has_a_row(arch, itemsize):
    rows = [*vendor.ATTENTION.values(), *vendor.PRODUCTS.values()]
    for sizes in ((1024, 1024), (7, 7), (1, 7)):
        for dropout in (True, False):
            found = vendor.attention(arch, itemsize, *sizes, dropout)
            assert found in rows
            if dropout or sizes[0] != sizes[1]:
                assert found.implementation == "own"
        assert vendor.attention(arch, itemsize, *sizes, repeatable=True).implementation == "own"
    for count in (1, 16, 17, 65536):
        for gelu in (True, False):
            assert vendor.product(arch, itemsize, count, gelu) in rows


def test_the_rows_meant():
    assert vendor.attention("sm_90", 2, 1024, 1024).implementation == "sdpa"
    assert vendor.attention("sm_90", 2, 1000, 1000).implementation == "flash"
    assert vendor.attention("sm_90", 2, 128, 128).implementation == "flash"
    assert vendor.attention("sm_89", 2, 1000, 1000).source == vendor._FLASH_2  # shares sm_86's
    assert vendor.attention("sm_90", 4, 1000, 1000).implementation == "sdpa"
    assert vendor.attention("gfx942", 4, 1024, 1024).implementation == "own"
    assert vendor.attention("gfx90a", 2, 1024, 1024).implementation == "sdpa"
    assert vendor.attention("gfx1100", 2, 1024, 1024).implementation == "own"
    assert vendor.attention("gfx1100", 4, 1024, 1024).implementation == "own"
    assert vendor.product("sm_90", 2, 16).implementation == "own"
    assert vendor.product("sm_90", 2, 17).implementation == "vendor"
    assert vendor.product("sm_90", 2, 17, gelu=True).implementation == "vendor"
    assert vendor.product("sm_90", 2, 65536, gelu=True).implementation == "own"
    assert vendor.product("gfx942", 2, 65536, gelu=True).implementation == "vendor"
    assert vendor.product("gfx1100", 2, 65536, gelu=True).implementation == "vendor"
    unknown = vendor.attention("sm_200", 2, 1024, 1024)
    assert unknown.implementation == "own"
    assert "sm_200" in unknown.source


def test_a_measured_row_names_its_results():
    for table, names in (
        (vendor.ATTENTION, {"own", "sdpa", "flash"}),
        (vendor.PRODUCTS, {"own", "vendor"}),
    ):
        for row in table.values():
            assert row.implementation in names
            assert row.source
            if row.measured:
                assert (ROOT / row.source.split(":")[0]).is_file(), row.source


class _Attention(TorchDispatchMode):
    """Takes note of PyTorch's kernels for attention, and of whether cuDNN's is on meanwhile."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func.name():
            self.seen.append(func.name())
            assert torch.backends.cuda.cudnn_sdp_enabled()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("T", "D", "available", "on", "flash"),
    [
        (1000, 64, True, True, True),
        (1, 64, True, True, True),
        (1000, 60, True, True, False),
        (1000, 64, False, True, False),
        (1000, 64, True, False, False),
        (1024, 64, True, True, False),  # cuDNN's, as PyTorch chooses
    ],
)
def test_flash_needs_no_switch_of_all_threads(dispatched, monkeypatch, T, D, available, on, flash):
    """One thread's would be on while another's ends, and stay as neither found it."""
    cuda = torch.backends.cuda
    monkeypatch.setattr(dispatch, "direct", lambda tensors: True)
    monkeypatch.setattr(cuda, "is_flash_attention_available", lambda: available)
    monkeypatch.setattr(cuda, "flash_sdp_enabled", lambda: on)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    with gpu.fake_gpu("sm_90"), _Attention() as kernels:
        block = torch.empty(2, T, 3, 4, D, dtype=torch.bfloat16, requires_grad=True)
        q, k, v = (t.transpose(1, 2) for t in block.unbind(2))
        y = ops.causal_attention(q, k, v)
        y.sum().backward()
        assert y.shape == (2, 4, T, D)
        assert y.transpose(1, 2).is_contiguous()
        assert block.grad.shape == block.shape
    name = "aten::_scaled_dot_product_flash_attention" + ("" if flash else "_for_cpu")
    assert kernels.seen == [name, f"{name}_backward"]
