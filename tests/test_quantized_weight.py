"""Weights in 8 and 4 bits: what is stored, and how near it is."""

import pytest
import torch

from fastgpt.quantized_weight import (
    PRECISIONS,
    dequantize,
    quantize_int4,
    quantize_int8,
    quantize_weight,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def unpacked(weight):
    """q of an Int4Weight, [n_out, n_in], element by element as the layout says."""
    n_out, n_bytes = weight.values.shape
    q = torch.empty(n_out, 2 * n_bytes, dtype=torch.int64)
    for i in range(2 * n_bytes):
        run, place = divmod(i, 32)
        byte = weight.values[:, 16 * run + place % 16].long()
        q[:, i] = byte >> 4 if place >= 16 else byte & 15
    return q


def wide_int4(weight):
    """An Int4Weight in float64, by the formula."""
    q = unpacked(weight)
    group = q.shape[1] // weight.scale.shape[1]
    scale, low = (t.double().repeat_interleave(group, 1) for t in weight[1:])
    return scale * q + low


class TestWeights:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_int8_is_half_a_step_away_at_most(self, dtype):
        w = (torch.randn(37, 96) * torch.logspace(-3, 3, 37)[:, None]).to(dtype)
        w[5] = 0
        stored = quantize_int8(w)
        assert (stored.values.dtype, stored.scale.dtype) == (torch.int8, torch.float32)
        assert stored.values.min() >= -127
        assert stored.values[5].count_nonzero() == stored.scale[5] == 0
        exact = stored.values.double() * stored.scale.double()[:, None]
        torch.testing.assert_close(stored.scale.double() * 127, w.double().abs().amax(1))
        step = stored.scale.double()[:, None]
        assert ((exact - w.double()).abs() <= step * 0.5 * (1 + 1e-4)).all()
        assert torch.equal(dequantize(stored, torch.float64), exact)
        torch.testing.assert_close(dequantize(stored, dtype), exact.to(dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("group", [32, 64])
    def test_int4_is_the_nearest_of_its_grid(self, dtype, group):
        w = (torch.randn(37, 192) * torch.logspace(-2, 2, 37)[:, None] + 0.01).to(dtype)
        stored = quantize_int4(w, group)
        assert [t.shape for t in stored] == [(37, 96), (37, 192 // group), (37, 192 // group)]
        kinds = [torch.uint8, torch.bfloat16, torch.bfloat16]
        assert [t.dtype for t in stored] == kinds
        exact = wide_int4(stored)
        grouped = w.double().unflatten(1, (-1, group))
        scale, low = (t.double()[..., None] for t in stored[1:])
        grid = scale[..., None] * torch.arange(16) + low[..., None]
        nearest = (grid - grouped[..., None]).abs().amin(-1).flatten(1)
        error = (exact - w.double()).abs()
        assert (error <= nearest + 1e-6 * w.double().abs()).all()
        # The grid from the least to the greatest errs by half a step, and by what bfloat16 takes
        # from its ends; the one that is taken has no larger sum of squares.
        reach = grouped.amax(-1) - grouped.amin(-1)
        ends = (grouped.amin(-1).abs() + reach) * 2.0**-8
        squares = error.square().unflatten(1, (-1, group)).sum(-1)
        assert (squares <= group * (reach / 30 + ends) ** 2).all()
        torch.testing.assert_close(dequantize(stored, torch.float64), exact)
        torch.testing.assert_close(dequantize(stored, dtype), exact.to(dtype))

    @pytest.mark.parametrize("group", [32, 64])
    def test_int4_fits_its_grid_to_the_weights(self, group):
        """Least squares from each group's ends alone get to 0.93 and 0.95 of the plain error."""
        w = torch.randn(256, 768)
        grouped = w.unflatten(1, (-1, group))
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        step = (high - low) / 15
        plain = (((grouped - low) / step).round() * step + low).flatten(1)
        for shift in (0.0, 0.25):  # what bfloat16 ends can follow
            stored = dequantize(quantize_int4(w + shift, group), torch.float32) - shift
            assert (stored - w).norm() < 0.92 * (plain - w).norm()

    @pytest.mark.parametrize("value", [0.0, 0.3, -2.7])
    def test_int4_of_one_value(self, value):
        stored = quantize_int4(torch.full((2, 64), value))
        assert (dequantize(stored, torch.float32) - value).abs().max() <= abs(value) * 2.0**-8

    def test_in_pieces_as_in_one(self):
        w = torch.randn(1500, 384)
        for precision in PRECISIONS:
            whole = quantize_weight(w, precision)
            parts = [quantize_weight(part, precision) for part in w.split(100)]
            for t, cut in zip(whole, zip(*parts, strict=True), strict=True):
                assert torch.equal(t, torch.cat(cut))

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_no_number(self, precision, value):
        w = torch.randn(4, 64)
        w[2, 40] = value
        with pytest.raises(ValueError, match="NaN, infinite or too large"):
            quantize_weight(w, precision)

    def test_what_has_no_such_form(self):
        for w, group, said in (
            (torch.randn(4, 48), 32, "its width 48 is not a multiple of the group of 32"),
            (torch.randn(4, 96), 64, "its width 96 is not a multiple of the group of 64"),
            (torch.randn(4, 96), 16, "a group of 16 is not possible, expected 32 or 64"),
            (torch.randn(96), 32, r"it is float32 \[96\], not a floating-point matrix"),
            (torch.ones(4, 96).int(), 32, r"it is int32 \[4, 96\], not"),
        ):
            with pytest.raises(ValueError, match=said):
                quantize_int4(w, group)
        with pytest.raises(ValueError, match="unknown precision 'int3', expected one of"):
            quantize_weight(torch.randn(4, 96), "int3")
