"""Sequences of different lengths in one pass: each row has the very bits that it has alone."""

import pytest
import torch
from same_bits import KINDS, LAYERS, ids_of, model_of

import fastgpt
from fastgpt import cpu
from fastgpt.cpu.forward import FEW_QUERIES, PackedSequence
from fastgpt.model.cache import KVCache
from fastgpt.model.rows import packed_pass, packs

pytestmark = pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing))
# Around what products and attention count as few, in a pass and alone.
LENGTHS = [(33, 70, 300, 65), (1, 5, 9, 17), (8, 8, 9), (1,) * 32, (32,), (40,), (64,), (290, 3)]


def _four_bits():
    """Whose widths are whole groups."""
    config = model_of().cfg | {"emb_dim": 192}
    return fastgpt.quantize(fastgpt.GPTModel(config).eval(), "int4")


def _cache(whole, capacity):
    head_dim = whole.width // whole.n_heads
    return torch.empty(LAYERS, 2, whole.n_heads, capacity, head_dim, dtype=whole.cache_dtype)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_sequence_is_as_alone(fused, kind):
    """Prompts, their logits, keys and values, and the steps behind them."""
    model = model_of(kind)
    whole = packed_pass(model)
    for lengths in LENGTHS:
        prompts = [ids_of(n) for n in lengths]
        for pack in packs(lengths):
            some = [prompts[i] for i in pack]
            new = [PackedSequence(len(p), 0, _cache(whole, len(p) + 1)) for p in some]
            last = whole.run_packed(torch.cat(some), new, last_only=True)
            every = whole.run_packed(torch.cat(some), [PackedSequence(len(p)) for p in some])
            caches = [KVCache(LAYERS) for _ in some]
            alone = [
                model.forward_pass(p[None], c, True)[0, 0]
                for p, c in zip(some, caches, strict=True)
            ]
            assert torch.equal(last, torch.stack(alone))
            assert torch.equal(every, torch.cat([model(p[None])[0] for p in some]))
            ids = ids_of(len(some))
            step = [PackedSequence(1, n, cache) for n, _, cache in new]
            ours = whole.run_packed(ids, step)
            for i, c in enumerate(caches):
                assert torch.equal(ours[i], model.forward_pass(ids[i : i + 1, None], c)[0, 0])
                for layer, (keys, values) in enumerate(c.get_all()):
                    held = new[i].cache[layer, :, :, : keys.shape[2]]
                    assert torch.equal(held, torch.cat((keys, values)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("past", [1, 7, 290])
@torch.no_grad()
def test_a_few_tokens_are_as_one_by_one(fused, kind, past):
    model, prompt = model_of(kind), ids_of(past)
    together, one_by_one = KVCache(LAYERS), KVCache(LAYERS)
    for cache in (together, one_by_one):
        model(prompt[None], cache=cache)
    ids = ids_of(FEW_QUERIES)[None]
    expected = [model(ids[:, i : i + 1], cache=one_by_one) for i in range(FEW_QUERIES)]
    assert torch.equal(model(ids, cache=together), torch.cat(expected, dim=1))


@torch.no_grad()
def test_four_bits_are_alike_for_two_tokens(fused):
    model, prompt = _four_bits(), ids_of(7)
    whole = packed_pass(model)
    assert whole.rows_alike == 2
    together, one_by_one = KVCache(LAYERS), KVCache(LAYERS)
    for cache in (together, one_by_one):
        model(prompt[None], cache=cache)
    ids = ids_of(2)[None]
    expected = [model(ids[:, i : i + 1], cache=one_by_one) for i in range(2)]
    assert torch.equal(model(ids, cache=together), torch.cat(expected, dim=1))


def test_packs_keep_few_and_many_apart(fused):
    few = cpu._C.few_rows(True)
    lengths = [1, 200, few, few + 1, few - 1, 300, 1, 1, 5000]
    found = packs(lengths, 600)
    assert sorted(i for pack in found for i in pack) == list(range(len(lengths)))
    many = cpu._C.few_rows(False)
    for pack in found:
        total = sum(lengths[i] for i in pack)
        assert len(pack) == 1 or total <= (few if lengths[pack[0]] <= few else 600)
        for limit in (few, many):
            assert len({lengths[i] > limit for i in pack} | {total > limit}) == 1
    assert max(map(len, packs([1] * 100))) <= few


@torch.no_grad()
def test_ids_are_checked(fused):
    whole = packed_pass(model_of())
    with pytest.raises(IndexError, match="token id 61 is outside the vocabulary of 61"):
        whole.run_packed(torch.tensor([1, 61]), [PackedSequence(1), PackedSequence(1)])


@torch.no_grad()
def test_a_modified_model_has_no_packed_pass():
    model = model_of()
    assert packed_pass(model) is not None
    model.train()
    assert packed_pass(model) is not None  # it drops nothing
    model.trf_blocks[1].ff.register_forward_hook(lambda *_: None)
    assert packed_pass(model) is None
    with torch.enable_grad():
        assert packed_pass(model_of()) is None
