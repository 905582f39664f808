import pytest
import torch
from torch.nn import functional as F

from fastgpt.triton.decode_attention import decode_attention, decode_attention_in_splits
from fastgpt.triton.decode_step import begin_step, query_key_value
from fastgpt.triton.linear_rows import linear_rows
from on_triton.support.cases import DTYPE_IDS, DTYPES, MODES, Case, empty
from on_triton.support.compare import check

pytestmark = pytest.mark.usefixtures("interpreted")
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
EPS = 1e-5


@DTYPE
def test_begin(padded, dtype):
    vocabulary, context, width = 11, 6, 33
    tok, pos = (padded(torch.randn(n, width).to(dtype)) for n in (vocabulary, context))
    ids = torch.tensor([3, 10, 0, 5, -1, vocabulary])
    position = padded(torch.tensor([0, 5, 2, context, 1, 1], dtype=torch.int32))
    before = position.clone()
    for table in (tok, tok.t().contiguous().t()):
        position.copy_(before)
        x = padded.empty(len(ids), width)
        place, length = (padded(torch.zeros_like(before)) for _ in range(2))
        counters = padded(torch.full((8,), 7, dtype=torch.int32))
        begin_step(ids, position, table, pos, x, place, length, counters)
        assert torch.equal(place, before)
        assert not counters.any()
        assert length.tolist() == [1, 6, 3, 6, 2, 2]
        assert position.tolist() == [0, 6, 3, 6, 2, 2]
        inside = [0, 1, 2]
        assert torch.equal(x[inside], tok[ids[inside]].float() + pos[before[inside]].float())
        assert x[3:].isnan().all()


@DTYPE
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 16), (3, 33), (2, 64)])
def test_queries_keys_and_values(padded, rows, heads, head_dim, dtype):
    """Weights in layouts of their own, some biases; a row past the cache's end writes nothing."""
    width, capacity = heads * head_dim, 5
    x, scale, shift = torch.randn(rows, width), 1 + torch.randn(width), torch.randn(width)
    x, scale, shift = padded(x), padded(scale.to(dtype)), padded(shift.to(dtype))
    weights = [(torch.randn(width, width) / width**0.5).to(dtype) for _ in range(3)]
    layouts = padded(weights[0], past_row=3), weights[1].t().contiguous().t(), padded(weights[2])
    biases = [padded(torch.randn(width).to(dtype)) for _ in range(2)]
    place = torch.arange(rows, dtype=torch.int32) % (capacity + 1)
    q = padded.empty(rows, heads, 1, head_dim, dtype=dtype)
    caches = [padded(torch.zeros(rows, heads, capacity, head_dim, dtype=dtype)) for _ in range(2)]
    given = biases[0], None, biases[1]
    query_key_value(x, (scale, shift, EPS), layouts, given, padded(place), q, *caches)
    inside = place < capacity
    at = torch.arange(rows)[inside], place[inside].long()
    found = [q[inside, :, 0], *(cache[at[0], :, at[1]] for cache in caches)]

    def f(scale, shift, *weights):
        wide = torch.promote_types(scale.dtype, torch.float32)
        normed = F.layer_norm(x[inside].to(wide), (width,), scale.to(wide), shift.to(wide), EPS)
        products = (
            F.linear(normed.to(w.dtype), w, None if b is None else b.to(w.dtype))
            for w, b in zip(weights, given, strict=True)
        )
        return tuple(y.unflatten(1, (heads, head_dim)) for y in products)

    check((*found, *[None] * 5), f, (scale, shift, *weights), [torch.ones_like(y) for y in found])
    for cache in caches:
        cache[at[0], :, at[1]] = 0
        assert (cache == 0).all()


@DTYPE
@pytest.mark.parametrize("batch", [1, 3])
def test_splits_joined_by_the_projection_are_the_attention(padded, batch, dtype):
    """The identity as projection. With 3 sequences the tests' GPU takes one split."""
    heads, capacity, head_dim = 2, 200, 33
    q = padded(torch.randn(batch, heads, 1, head_dim).to(dtype))
    keys, values = (padded(torch.randn(batch, heads, capacity, head_dim)).to(dtype) for _ in "kv")
    length = torch.tensor([70, 1, 200][:batch], dtype=torch.int32)
    whole = torch.empty_like(q)
    decode_attention(q, keys, values, length, 0.2, whole)
    part, lse = decode_attention_in_splits(q, keys, values, length, 0.2)
    assert (lse is None) == (batch == 3)
    eye = torch.eye(heads * head_dim, dtype=dtype)
    y = torch.empty(batch, heads * head_dim, dtype=dtype)
    linear_rows(part, eye, None, y, lse=lse)
    torch.testing.assert_close(y, whole.flatten(1))


def _begin(dtype, *counters):
    n = 16
    numbers = [empty(torch.int32, n) for _ in range(3)]
    tables = empty(dtype, 50257, 768), empty(dtype, 1024, 768)
    x = empty(torch.float32, n, 768)
    begin_step(empty(torch.int64, n), numbers[0], *tables, x, *numbers[1:], *counters)


def _query_key_value(rows, by_column=False, biases=True):
    def run(dtype):
        weights = [empty(dtype, 768, 768) for _ in range(3)]
        if by_column:  # parts of one tensor, as Hugging Face's
            weights = empty(dtype, 768, 3, 768).unbind(1)
            weights = [w.t() for w in weights]
        bias = empty(dtype, 768)
        caches = [empty(dtype, rows, 12, 1024, 64) for _ in range(2)]
        norm = bias, bias, EPS
        query_key_value(
            empty(torch.float32, rows, 768),
            norm,
            weights,
            [bias if biases else None] * 3,
            empty(torch.int32, rows),
            empty(dtype, rows, 12, 1, 64),
            *caches,
        )

    return run


WIDE = {
    "wide": ("query_key_value_kernel",),
    "sample": ("bfloat16", "float32"),
    "modes": tuple(MODES),
}
CASES = {
    "begin": Case(_begin),
    "begin, counters": Case(lambda dtype: _begin(dtype, empty(torch.int32, 12))),
    "row": Case(_query_key_value(1), **WIDE),
    "four rows": Case(_query_key_value(4, biases=False), wide=WIDE["wide"]),
    "rows": Case(_query_key_value(16), **WIDE),
    "column by column, row": Case(_query_key_value(1, True), **WIDE),
    "column by column, rows": Case(_query_key_value(16, True), **WIDE),
}
