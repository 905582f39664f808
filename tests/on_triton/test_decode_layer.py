"""A layer as one launch gives the same bits as its five launches, phase by phase on several
programs, and all phases on one: the interpreter runs programs one after another, so that two would
wait for each other for ever.
"""

import re

import pytest
import torch
from pairs import pair, some_ids

import fastgpt
from fastgpt import dispatch, reference
from fastgpt.model.cache import idle
from fastgpt.triton import compilation, decode_attention, launch_table
from fastgpt.triton.decode_layer import PHASES, decode_layer
from fastgpt.triton.decode_step import query_key_value
from fastgpt.triton.linear_rows import linear_rows
from on_triton.support import gpu
from on_triton.support.cases import DTYPE_IDS, DTYPES, MODES, Case, empty
from on_triton.test_compilation import side_by_side

pytestmark = pytest.mark.usefixtures("interpreted")
EPS = 1e-5
HEADS, HEAD_DIM, CAPACITY = 2, 24, 40
WIDTH, HIDDEN = HEADS * HEAD_DIM, 80
NVIDIA = tuple(arch for arch in gpu.ARCHS if arch.startswith("sm_"))


@pytest.fixture
def one_program(launched_with, monkeypatch):
    """All phases on a GPU that holds one program."""
    launched_with("decode_layer", PROGRAMS=1)
    monkeypatch.setattr(launch_table, "device_of", lambda x: launch_table.Device("sm_80", 1))


def _parameters(dtype, by_column, biases):
    def linear(n_out, n_in):
        weight = (torch.randn(n_out, n_in) / n_in**0.5).to(dtype)
        weight = weight.t().contiguous().t() if by_column else weight
        return weight, torch.randn(n_out).to(dtype) if biases else None

    def norm():
        return (1 + torch.randn(WIDTH)).to(dtype), torch.randn(WIDTH).to(dtype)

    linears = [*(linear(WIDTH, WIDTH) for _ in range(4)), linear(HIDDEN, WIDTH)]
    return (norm(), norm()), (*linears, linear(WIDTH, HIDDEN))


def _in_five(x, norms, linears, place, length, keys, values):
    """x, the caches, and what lies between the launches."""
    x, keys, values = x.clone(), keys.clone(), values.clone()
    q = torch.full((len(x), HEADS, 1, HEAD_DIM), torch.nan, dtype=keys.dtype)
    hidden = torch.empty(len(x), HIDDEN, dtype=keys.dtype)
    weights, biases = zip(*linears[:3], strict=True)
    query_key_value(x, (*norms[0], EPS), weights, biases, place, q, keys, values)
    attend = decode_attention.decode_attention_in_splits
    part, lse = attend(q, keys, values, length, HEAD_DIM**-0.5)
    linear_rows(part, *linears[3], x, lse=lse, residual=x)
    linear_rows(x, *linears[4], hidden, gelu=True, norm=(*norms[1], EPS))
    linear_rows(hidden, *linears[5], x, residual=x)
    return x, keys, values, q, part, lse, hidden


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("by_column", [False, True], ids=["by row", "by column"])
@pytest.mark.parametrize(("biases", "splits"), [(False, 2), (True, 1)])
def test_the_same_bits_as_five_launches(
    launched_with, monkeypatch, request, padded, biases, by_column, splits, rows, dtype
):
    for kernel in ("linear_rows", "linear_columns"):  # the last tile reaches past the end
        launched_with(kernel, BLOCK_N=32, BLOCK_K=64)
    launched_with("decode_attention_split", BLOCK_N=16)
    launched_with("decode_layer", PROGRAMS=1)
    monkeypatch.setattr(decode_attention, "_splits", lambda keys, most: splits)
    norms, linears = _parameters(dtype, by_column, biases)
    x = torch.randn(rows, WIDTH)
    keys, values = (torch.randn(rows, HEADS, CAPACITY, HEAD_DIM).to(dtype) for _ in "kv")
    # One token, and a row at its cache's end, which writes nothing.
    place = torch.arange(rows, dtype=torch.int32) * 13 % (CAPACITY + 1)
    length = (place + 1).clamp(max=CAPACITY)
    expected = _in_five(x, norms, linears, place, length, keys, values)

    def run(*phases):
        mine = [padded(t) for t in (x, keys, values)]
        between = [t if t is None else padded(torch.full_like(t, torch.nan)) for t in expected[3:]]
        counter = torch.zeros(1, dtype=torch.int32)
        for some in phases:
            where = place, length, *mine[1:]
            decode_layer(mine[0], norms, linears, EPS, *where, between, counter, some)
        for ours, theirs in zip((*mine, *between), expected, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)
        return counter.item()

    assert run(*((phase, phase) for phase in range(PHASES))) == 0
    request.getfixturevalue("one_program")
    assert run((0, PHASES - 1)) == PHASES - 1


@pytest.fixture
def model(dispatched, captures, one_program, monkeypatch):
    """One whose tokens are asked for by the switch, with the book's; and the layers so launched."""
    monkeypatch.setenv("FASTGPT_DECODE_LAYER", "1")
    ours, book = pair(n_layers=2)
    launched = []
    launchers = dispatch.module("triton", "decode_layer", ours.pos_emb.weight)
    layer = launchers.decode_layer
    monkeypatch.setitem(vars(launchers), "decode_layer", lambda *a: launched.append(1) or layer(*a))

    def same(new):
        ids = some_ids(B=2, T=3)
        mine = fastgpt.generate_text_simple(ours, ids, new, 32)
        assert torch.equal(mine, reference.generate_text_simple(book, ids, new, 32))
        idle.clear()
        return len(launched)

    return same


def test_the_books_tokens(model):
    assert model(5) == 2 * 5


@pytest.mark.parametrize("obstacle", ["no switch", "AMD", "it failed"])
def test_five_launches_where_it_does_not_serve(model, monkeypatch, obstacle):
    if obstacle == "no switch":
        monkeypatch.setenv("FASTGPT_DECODE_LAYER", "0")
    elif obstacle == "AMD":
        monkeypatch.setattr(launch_table, "device_of", lambda x: launch_table.Device("gfx942", 1))
    else:
        monkeypatch.setattr(dispatch, "_failed", {("decode_layer", None): "does not compile"})
    assert model(5) == 0


def _layer(rows, width=768, heads=12, by_column=False, biases=True, past=0):
    def run(dtype):
        def linear(n_out, n_in):
            weight = empty(dtype, n_in, n_out).t() if by_column else empty(dtype, n_out, n_in)
            return weight, empty(dtype, n_out) if biases else None

        norm = empty(dtype, width), empty(dtype, width)
        linears = [*(linear(width, width) for _ in range(4)), linear(4 * width, width)]
        q = empty(dtype, rows, heads, 1, width // heads)
        caches = [empty(dtype, rows, heads, 1024, width // heads) for _ in range(2)]
        decode_layer(
            empty(torch.float32, rows, width),
            (norm, norm),
            (*linears, linear(width, 4 * width)),
            EPS,
            *(empty(torch.int32, rows) for _ in range(2)),
            *caches,
            (q, *decode_attention.empty_splits(q, caches[0]), empty(dtype, rows, 4 * width)),
            gpu.Unaligned() if past else empty(torch.int32, 1),
        )

    return run


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_barrier_releases_what_was_written_and_acquires_what_is_read(arch):
    """Of one thread each, between barriers of the program; nothing is read between these, and
    nothing anywhere through the cache for constants.
    """
    with gpu.fake_gpu(arch) as launches:
        _layer(1)(torch.bfloat16)
    ptx = launches[0].compiled.asm["ptx"]
    order = re.findall(
        r"bar\.sync|(?:red|atom)\.global\.gpu\.release\.add|(?:ld|atom)\.global\.gpu\.acquire"
        r"|ld\.global|cp\.async|st\.global",
        ptx,
    )
    told = [i for i, found in enumerate(order) if "release" in found]
    assert len(told) == order.count("ld.global.gpu.acquire") == PHASES - 1
    for i in told:
        assert order[i - 1] == "bar.sync"
        seen = order.index("ld.global.gpu.acquire", i)
        assert set(order[i + 1 : seen]) <= {"bar.sync"}
        assert order[seen + 1 : seen + 3] == ["bar.sync"] * 2
    assert "ld.global.nc" not in ptx


def test_each_layers_counter_compiles_nothing_anew():
    with gpu.fake_gpu("sm_90") as launches:
        for past in (0, 1):
            _layer(1, past=past)(torch.bfloat16)
    assert launches[0].compiled is launches[1].compiled
    assert launches[0].grid == (3 * 132,)
    assert launches[0].compiled.metadata.launch_cooperative_grid


@side_by_side
def test_it_is_compiled_ahead_of_its_launch(monkeypatch):
    with gpu.fake_gpu("sm_90") as launches:
        compilation.compile_ahead(lambda: _layer(2, 48, 3)(torch.bfloat16))
        assert launches == []
        compiled = []
        monkeypatch.setattr("triton.knobs.compilation.listener", lambda **of: compiled.append(of))
        _layer(2, 48, 3)(torch.bfloat16)
    assert len(launches) == 1
    assert compiled == []


WIDE = {
    "wide": ("decode_layer_kernel",),
    "sample": ("bfloat16", "float32"),
    "modes": tuple(MODES),
    "archs": NVIDIA,
}
CASES = {
    "row": Case(_layer(1), **WIDE),
    "row of XL": Case(_layer(1, 1600, 25, biases=False), **WIDE),
    "two rows": Case(_layer(2, biases=False), **WIDE),
    "four rows": Case(_layer(4), **WIDE),
    "rows": Case(_layer(16), **WIDE),
    "column by column, row": Case(_layer(1, by_column=True), **WIDE),
    "column by column, four rows": Case(_layer(4, by_column=True), **WIDE),
    "column by column, rows": Case(_layer(16, by_column=True), **WIDE),
}
