"""The product with a weight in 8 or 4 bits: values, gradients, transforms, what is refused."""

import pytest
import torch
from helpers import PAIRS, PATHS, use_path
from pairs import some_ids, weigh
from quantized_models import KINDS, logits, quantized
from torch.nn import functional as F

import fastgpt
from fastgpt import ops
from fastgpt.quantized_weight import PRECISIONS, dequantize, quantize_int4, quantize_weight

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class TestOperation:
    @pytest.mark.parametrize(
        ("path", "dtype"),
        [(path, torch.float32) for path in PATHS] + [("auto", dtype) for dtype in DTYPES],
    )
    @pytest.mark.parametrize(("precision", "group"), KINDS)
    def test_against_float64(self, path, precision, group, dtype):
        stored = quantize_weight(torch.randn(37, 192), precision, group)
        x, bias = torch.randn(2, 3, 192).to(dtype), torch.randn(37).to(dtype)
        x[0, 1] = 0
        dynamic = precision == "int8-dynamic"
        wide = x.double()
        if dynamic:
            scale = wide.abs().amax(-1, keepdim=True) / 127
            wide = (wide / scale.where(scale > 0, 1)).round() * scale
        exact = F.linear(wide, dequantize(stored, torch.float64), bias.double())
        with use_path(path):
            y = ops.quantized_linear(x, stored, bias, dynamic)
            pairs = fastgpt.cpu.isa() == PAIRS and path != "reference"
        assert y.dtype == dtype
        size = F.linear(wide.abs(), dequantize(stored, torch.float64).abs())
        # A value of x halfway between two of the grid may go to either.
        halfway = 127 * 1e-6 if dynamic else 0
        # Of each pair, two factors that are rounded by 2^-9 at most.
        factors = 2.0**-8 if pairs and not dynamic and dtype == torch.float32 else 0
        allowed = 4 * torch.finfo(dtype).eps + halfway + factors
        assert ((y.double() - exact).abs() <= size * allowed).all()

    # Of torch's own jvp, a DeprecationWarning or a FutureWarning.
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script")
    @pytest.mark.parametrize(("precision", "group"), KINDS)
    def test_gradients(self, precision, group):
        stored = quantize_weight(torch.randn(5, 64), precision, group)
        dynamic = precision == "int8-dynamic"
        x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

        def product(x, bias=None):
            return ops.quantized_linear(x, stored, bias, dynamic)

        wide = dequantize(stored, torch.float64)
        got = torch.autograd.grad(weigh(product(x, bias)), (x, bias))
        right = torch.autograd.grad(weigh(F.linear(x, wide, bias)), (x, bias))
        torch.testing.assert_close(got, right)
        per_row = torch.func.vmap(torch.func.grad(lambda row: product(row).sum()))(x.detach())
        torch.testing.assert_close(per_row, wide.sum(0).expand(3, 64))
        _, tangent = torch.func.jvp(product, (x.detach(),), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, wide.sum(1).expand(3, 5))
        if not dynamic:
            assert torch.autograd.gradgradcheck(product, (x, bias))

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_autocast(self, precision):
        model, ids = quantized(precision), some_ids()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = model(ids)
        assert y.dtype == torch.bfloat16
        assert (y - logits(model)).abs().max() < 0.1 * y.abs().max()

    def test_nan_goes_through(self):
        x = torch.randn(2, 64)
        x[1, 3] = torch.nan
        for precision in PRECISIONS:
            stored = quantize_weight(torch.randn(5, 64), precision)
            y = ops.quantized_linear(x, stored, dynamic=precision == "int8-dynamic")
            assert y[0].isfinite().all()
            assert y[1].isnan().all()

    def test_what_does_not_fit(self):
        stored = quantize_int4(torch.randn(5, 64))
        with pytest.raises(TypeError, match="dynamic takes an Int8Weight, got Int4Weight"):
            ops.quantized_linear(torch.randn(2, 64), stored, dynamic=True)
        with pytest.raises(RuntimeError, match="shapes"):
            ops.quantized_linear(torch.randn(2, 32), stored)
        with pytest.raises(TypeError, match="the weight's scale must be a tensor, got float"):
            ops.quantized_linear(torch.randn(2, 64), stored._replace(scale=2.0))
