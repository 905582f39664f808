from pathlib import Path

import pytest

from fastgpt.triton import choices

ROOT = Path(__file__).parents[2]
ARCHS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_shape_has_a_row(arch, itemsize):
    rows = [*choices.ATTENTION.values(), *choices.PRODUCTS.values()]
    for sizes in ((1024, 1024), (7, 7), (1, 7)):
        for dropout in (True, False):
            found = choices.attention(arch, itemsize, *sizes, dropout)
            assert found in rows
            if dropout or sizes[0] != sizes[1]:
                assert found.implementation == "own"
        assert choices.attention(arch, itemsize, *sizes, repeatable=True).implementation == "own"
    for count in (1, 16, 17, 65536):
        for gelu in (True, False):
            assert choices.product(arch, itemsize, count, gelu) in rows


def test_the_rows_meant():
    assert choices.attention("sm_90", 2, 1024, 1024).implementation == "sdpa"
    assert choices.attention("sm_90", 2, 1000, 1000).implementation == "flash"
    assert choices.attention("sm_90", 2, 128, 128).implementation == "flash"
    assert choices.attention("sm_89", 2, 1000, 1000).source == choices._FLASH_2  # shares sm_86's
    assert choices.attention("sm_90", 4, 1000, 1000).implementation == "sdpa"
    assert choices.attention("gfx942", 4, 1024, 1024).implementation == "own"
    assert choices.product("sm_90", 2, 16).implementation == "own"
    assert choices.product("sm_90", 2, 17).implementation == "vendor"
    assert choices.product("sm_90", 2, 17, gelu=True).implementation == "vendor"
    assert choices.product("sm_90", 2, 65536, gelu=True).implementation == "own"
    assert choices.product("gfx942", 2, 65536, gelu=True).implementation == "vendor"
    unknown = choices.attention("sm_200", 2, 1024, 1024)
    assert unknown.implementation == "own"
    assert "sm_200" in unknown.source


def test_a_measured_row_names_its_results():
    for table, names in (
        (choices.ATTENTION, {"own", "sdpa", "flash"}),
        (choices.PRODUCTS, {"own", "vendor"}),
    ):
        for row in table.values():
            assert row.implementation in names
            assert row.source
            if row.measured:
                assert (ROOT / row.source.split(":")[0]).is_file(), row.source
