"""The launchers against a GPU that is not there: grids, and what is compiled how often."""

import pytest
import torch

from fastgpt.triton import launch_table
from fastgpt.triton.cross_entropy import cross_entropy
from fastgpt.triton.embedding import embedding, embedding_backward
from fastgpt.triton.gelu import bias_gelu, bias_gelu_backward
from fastgpt.triton.layer_norm import layer_norm, layer_norm_backward
from fastgpt.triton.linear import linear
from fastgpt.triton.linear_cross_entropy import linear_cross_entropy
from on_triton.support.cases import empty
from on_triton.support.gpu import fake_gpu

BF16 = torch.bfloat16


def _layer_norm(rows, seed=7):
    x, weight, stats = empty(BF16, rows, 768), empty(BF16, 768), empty(torch.float32, rows)
    layer_norm(x, weight, weight, 1e-5, x, stats, stats, x, x, 0.1, seed)
    layer_norm_backward(x, x, weight, stats, stats, x, weight, weight, x, x, 0.1, seed)


def _embedding(rows, seed=7, past=0):
    idx, y = empty(torch.int64, 1, rows), empty(BF16, 1, rows, 768)
    tok, pos = empty(BF16, 50257, 768), empty(BF16, rows, 768)
    embedding(idx, tok, pos, past, y, 0.1, seed)
    embedding_backward(y, idx, tok, pos, past, 0.1, seed)


def test_two_programs_a_multiprocessor_sum_the_gradients():
    with fake_gpu("sm_90") as launches:
        _layer_norm(65536)
        _layer_norm(5)
    grids = [(launch.name, launch.grid) for launch in launches]
    assert grids == [
        ("layer_norm_fwd_kernel", (65536,)),
        ("layer_norm_bwd_kernel", (264,)),
        ("sum_rows_kernel", (24, 2)),
        ("layer_norm_fwd_kernel", (5,)),
        ("layer_norm_bwd_kernel", (2,)),
        ("sum_rows_kernel", (24, 2)),
    ]
    assert launches[1].arguments["partial_ptr"].shape == (2, 264, 768)


def test_tma_stays_for_many_tiles():
    with fake_gpu("sm_90") as launches:
        for rows in (65536, 200):
            linear(empty(BF16, rows, 768), empty(BF16, 768, 768), None, empty(BF16, rows, 768))
    assert [launch.grid for launch in launches] == [(132,), (6,)]
    assert launches[0].compiled is launches[1].compiled


def test_the_head_goes_in_chunks():
    with fake_gpu("sm_90") as launches:
        x, weight = empty(BF16, 12000, 768), empty(BF16, 50257, 768)
        targets, loss = empty(torch.int64, 12000), empty(torch.float32, 12000)
        linear_cross_entropy(x, weight, targets, -100, loss, loss, x, weight)
    assert [launch.grid for launch in launches] == [(5248,), (5248, 13)] * 2 + [(1504,), (1504, 13)]
    assert launches[0].arguments["stride_row"] == 50304


@pytest.mark.parametrize("call", [_layer_norm, _embedding])
def test_a_new_seed_compiles_nothing_anew(call):
    with fake_gpu("sm_90") as launches:
        for seed in (1, 16, 12345):
            call(4096, seed)
    assert len({id(launch.compiled) for launch in launches}) == len(launches) // 3


def test_a_new_length_or_position_compiles_nothing_anew():
    with fake_gpu("sm_90") as launches:
        for past in (0, 1, 16, 1000):
            _embedding(4096, past=past)
        for rows in (1, 3, 16, 17, 200, 4096):
            _embedding(rows)
            _layer_norm(rows)
            x = empty(BF16, rows + 16, 64)
            bias_gelu(x, None, x)
            linear(x, empty(BF16, 64, 64), None, x)
    names = {launch.name for launch in launches}
    assert len({id(launch.compiled) for launch in launches}) == len(names)


def test_a_target_to_ignore_compiles_nothing_anew():
    with fake_gpu("sm_90") as launches:
        for ignore_index in (-100, 0, 1):
            targets, loss = empty(torch.int64, 16), empty(torch.float32, 16)
            cross_entropy(empty(BF16, 16, 64), targets, ignore_index, loss, loss)
    assert len({id(launch.compiled) for launch in launches}) == 1


def test_nothing_to_do_launches_nothing():
    with fake_gpu("sm_90") as launches:
        none, weight, stats = empty(BF16, 0, 64), empty(BF16, 64), empty(torch.float32, 0)
        layer_norm(none, weight, weight, 1e-5, none, stats, stats)
        layer_norm_backward(none, none, weight, stats, stats, none, weight, weight)
        bias_gelu(none, weight, none)
        bias_gelu_backward(none, none, weight, none, weight)
        linear(none, empty(BF16, 64, 64), weight, none)
        cross_entropy(none, empty(torch.int64, 0), -100, stats, stats)
        embedding(empty(torch.int64, 0, 3), weight, weight, 0, empty(BF16, 0, 3, 64))
    assert launches == []


def test_the_table_names_the_nearest_row(monkeypatch):
    any_, half, sized, arch = ({"n": i} for i in range(4))
    rows = {
        ("*", "*", "*"): any_,
        ("*", "half", "*"): half,
        ("*", "*", 64): sized,
        ("sm_86", "*", "*"): arch,
    }
    monkeypatch.setitem(launch_table.TABLE, "some", rows)
    assert launch_table.lookup("some", "sm_80", 4) is any_
    assert launch_table.lookup("some", "sm_80", 2) is half
    assert launch_table.lookup("some", "sm_80", 2, 64) is half  # the dtype before the size
    assert launch_table.lookup("some", "sm_80", 4, 64) is sized
    assert launch_table.lookup("some", "sm_89", 2, 64) is arch  # one that shares its rows
    del rows["*", "*", "*"]
    with pytest.raises(KeyError, match="some have no row for gfx942, float, size 128"):
        launch_table.lookup("some", "gfx942", 4, 128)
