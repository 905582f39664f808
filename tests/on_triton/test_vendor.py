from pathlib import Path

import pytest

from fastgpt.triton import vendor

ROOT = Path(__file__).parents[2]
ARCHS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]


@pytest.mark.parametrize("arch", ARCHS)
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
    assert vendor.product("sm_90", 2, 16).implementation == "own"
    assert vendor.product("sm_90", 2, 17).implementation == "vendor"
    assert vendor.product("sm_90", 2, 17, gelu=True).implementation == "vendor"
    assert vendor.product("sm_90", 2, 65536, gelu=True).implementation == "own"
    assert vendor.product("gfx942", 2, 65536, gelu=True).implementation == "vendor"
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
