import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import dispatch, ops
from fastgpt.triton import vendor
from on_triton.support import gpu

ROOT = Path(__file__).parents[2]


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
    for arch in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120"):
        assert vendor.attention(arch, 2, 1024, 1024, dropout=True).implementation == "flash"
        assert vendor.attention(arch, 4, 100, 100, dropout=True).implementation == "efficient"
        repeated = vendor.attention(arch, 4, 100, 100, dropout=True, repeatable=True)
        assert repeated.implementation == "own"
    for arch in ("gfx90a", "gfx942", "gfx1100", "sm_200"):
        assert vendor.attention(arch, 2, 1024, 1024, dropout=True).implementation == "own"
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
        (vendor.ATTENTION, {"own", "sdpa", "flash", "efficient"}),
        (vendor.PRODUCTS, {"own", "vendor"}),
    ):
        for row in table.values():
            assert row.implementation in names
            assert row.source
            if row.measured:
                assert (ROOT / row.source.split(":")[0]).is_file(), row.source


class _Attention(TorchDispatchMode):
    """Takes note of PyTorch's kernels for attention with their dropout, and of whether all of its
    kernels are on meanwhile.
    """

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func.name():
            names = [one.name for one in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            name = func.name().removeprefix("aten::_scaled_dot_product_")
            self.seen.append((name, given.get("dropout_p", 0.0)))
            cuda = torch.backends.cuda
            assert cuda.cudnn_sdp_enabled()
            assert cuda.flash_sdp_enabled()
            assert cuda.mem_efficient_sdp_enabled()
            assert cuda.math_sdp_enabled()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def attended(dispatched, monkeypatch):
    """PyTorch's kernels for attention, and ours, that run for q, k and v as one product leaves them
    on an H100.
    """
    monkeypatch.setattr(dispatch, "direct", lambda tensors: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)

    def kernels(T, D, dtype, dropout_p=0.0, takes=True, requires_grad=True, first=0, scale=None):
        for name in ("flash", "efficient"):
            can = f"can_use_{name}_attention"
            monkeypatch.setattr(torch.backends.cuda, can, lambda params: takes)
        with gpu.fake_gpu("sm_90") as launches, _Attention() as theirs:
            block = torch.empty(2, T, 3, 4, D + first, dtype=dtype, requires_grad=requires_grad)
            q, k, v = (t.transpose(1, 2)[..., first:] for t in block.unbind(2))
            y = ops.causal_attention(q, k, v, scale, dropout_p)
            assert y.shape == (2, 4, T, D)
            assert y.transpose(1, 2).is_contiguous()
            if requires_grad:
                y.sum().backward()
                assert block.grad.shape == block.shape
        return [*theirs.seen, *(launch.name for launch in launches)]

    return kernels


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("T", "D", "takes", "flash"),
    [
        (1000, 64, True, True),
        (1, 64, True, True),
        (1000, 60, True, False),
        (1000, 64, False, False),
        (1024, 64, True, False),  # cuDNN's, as PyTorch chooses
    ],
)
def test_flash_needs_no_switch_of_all_threads(attended, T, D, takes, flash):
    """One thread's would be on while another's ends, and stay as neither found it."""
    name = "flash_attention" + ("" if flash else "_for_cpu")
    assert attended(T, D, BF16, takes=takes) == [(name, 0.0), (f"{name}_backward", 0.0)]


@pytest.mark.parametrize(
    ("dtype", "name"), [(BF16, "flash"), (torch.float16, "flash"), (torch.float32, "efficient")]
)
@pytest.mark.parametrize("T", [1, 1000, 1024])
def test_dropout_by_pytorchs_kernel(attended, dtype, name, T):
    """.. whose mask does not depend on whether a gradient is wanted: the call is the same."""
    forward, backward = (f"{name}_attention{part}" for part in ("", "_backward"))
    torch.manual_seed(1)
    assert attended(T, 64, dtype, 0.1) == [(forward, 0.1), (backward, 0.1)]
    assert attended(T, 64, dtype, 0.1, requires_grad=False) == [(forward, 0.1)]
    drawn = torch.rand(1)  # nothing came of the CPU's generator
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize(
    "case",
    [
        {"takes": False},
        {"D": 60},  # flash would be given copies
        {"D": 2, "dtype": torch.float32},
        {"first": 4},  # rows that start at 8 bytes
        {"dropout_p": 1.0},
        {"scale": 0.0},
        {"scale": -0.3},
    ],
    ids=str,
)
def test_dropout_by_our_kernel_where_pytorchs_does_not_run(attended, monkeypatch, case):
    """Its next choice would be a block of queries x keys."""
    module = sys.modules["fastgpt.ops.causal_attention"]
    monkeypatch.setattr(module, "draw_seed", lambda device, p: 7)
    case = {"T": 100, "D": 64, "dtype": BF16, "dropout_p": 0.1} | case
    assert attended(**case, requires_grad=False) == ["causal_attention_fwd_kernel"]
