"""The key-value cache, with the interface of the book's package."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

# By model, the one decoder by CUDA graphs, with caches of its own, that nobody is using.
idle: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class KVCache:
    """One slot a layer for that layer's keys and values; one object a conversation.

    A slot holds None or a pair of keys and values, each [B, H, T, D]. ``model(idx, cache=cache)``
    reads and fills it; positions go on from the cached tokens.

    Args:
        n_layers: number of layers.
    """

    def __init__(self, n_layers: int) -> None:
        self.cache: list[tuple[Tensor, Tensor] | None] = [None] * n_layers

    def get(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """The layer's keys and values, or None."""
        return self.cache[layer_idx]

    def update(self, layer_idx: int, value: tuple[Tensor, Tensor] | None) -> None:
        """Sets the layer's keys and values."""
        self.cache[layer_idx] = value

    def get_all(self) -> list[tuple[Tensor, Tensor] | None]:
        """Every layer's keys and values."""
        return self.cache

    def reset(self) -> None:
        """Forgets everything."""
        self.cache[:] = [None] * len(self.cache)


class OwnCache(KVCache):
    """A model's own cache: of the tokens that the model has `seen`, it holds the last ones."""

    seen = 0


# Held while a slot goes on from another one's blocks: of several threads one alone may.
_going_on = threading.Lock()


class _Blocks:
    """Room for the keys and values of one layer: two blocks [B, H, capacity, D], of which `written`
    tokens count.
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.written = 0


class Slot(tuple[Tensor, Tensor]):
    """Keys and values, each [B, H, T, D], as views of blocks with room for more tokens."""

    blocks: _Blocks

    @classmethod
    def longer(
        cls,
        old: tuple[Tensor, Tensor] | None,
        shape: tuple[int, int, int, int],
        limit: int,
        like: Tensor,
    ) -> Slot:
        """A slot of the shape [B, H, T, D] that begins with the old one's tokens; the rest is to be
        written.

        It is of like's dtype and device; ValueError if the old one is of another shape or dtype.
        It shares the old one's blocks where they have room and no other slot has gone on from
        there.
        """
        batch, heads, length, head_dim = shape
        past = 0 if old is None else old[0].shape[2]
        for tensor in old or ():
            if tensor.shape != (batch, heads, past, head_dim) or tensor.dtype != like.dtype:
                raise ValueError(
                    f"the cache holds {list(tensor.shape)} in {tensor.dtype}, this model takes "
                    f"{[batch, heads, past, head_dim]} in {like.dtype}"
                )
        if isinstance(old, Slot) and old.blocks.keys.shape[2] >= length:
            with _going_on:
                if old.blocks.written == past:
                    return cls.of(old.blocks, length)
        blocks = _Blocks((batch, heads, min(limit, max(2 * length, 64)), head_dim), like)
        if old is not None:
            blocks.keys[:, :, :past], blocks.values[:, :, :past] = old
        return cls.of(blocks, length)

    @classmethod
    def of(cls, blocks: _Blocks, tokens: int) -> Slot:
        """The first tokens of the blocks; what comes next goes over the rest."""
        blocks.written = tokens
        slot = cls((blocks.keys[:, :, :tokens], blocks.values[:, :, :tokens]))
        slot.blocks = blocks
        return slot


def shorten(cache: KVCache, tokens: int) -> None:
    """Forgets all but the first tokens of every layer."""
    for layer, pair in enumerate(cache.get_all()):
        if pair is not None and pair[0].shape[2] > tokens:
            if isinstance(pair, Slot):
                cache.update(layer, Slot.of(pair.blocks, tokens))
            else:
                cache.update(layer, (pair[0][:, :, :tokens], pair[1][:, :, :tokens]))


def extended(
    old: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor, limit: int
) -> tuple[Tensor, Tensor]:
    """The old pair with these tokens behind it. keys, values: [B, H, T, D]."""
    if keys.requires_grad or values.requires_grad or (old is not None and old[0].requires_grad):
        if old is None:
            return keys, values
        return torch.cat((old[0], keys), dim=2), torch.cat((old[1], values), dim=2)
    past, (B, H, T, D) = 0 if old is None else old[0].shape[2], keys.shape
    slot = Slot.longer(old, (B, H, past + T, D), limit, keys)
    slot[0][:, :, past:], slot[1][:, :, past:] = keys, values
    return slot


def cached_tokens(cache: Any, layer: int) -> int:
    """How many tokens this layer's slot holds; 0 without a cache, or where it has no such layer."""
    if cache is None:
        return 0
    try:
        pair = cache.get(layer)
    except IndexError:
        return 0
    return 0 if pair is None else int(pair[0].shape[2])


def tokens_seen(cache: Any) -> int:
    """How many tokens stand before the next: those in the cache, and those it has dropped."""
    return cache.seen if isinstance(cache, OwnCache) else cached_tokens(cache, 0)


class CacheTransaction:
    """A cache during one forward pass: what the layers write reaches it only once all have.

    Args:
        cache: where the pairs come from and go to.
        batch: the ids' batch size.
        tokens: how many tokens the pass adds.
        limit: the most tokens that a layer may hold; the oldest are dropped first.
    """

    def __init__(self, cache: Any, batch: int, tokens: int, limit: int) -> None:
        self.cache, self.batch, self.tokens, self.limit = cache, batch, tokens, limit
        self.held = cached_tokens(cache, 0)
        self.past = min(self.held, limit - tokens)  # as many as the pass sees
        # The position of the first of them.
        self.first = tokens_seen(cache) - self.past
        self.new: dict[int, tuple[Tensor, Tensor]] = {}

    def get(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The layer's pair that this pass sees, [batch, H, past, D]; ValueError if the cache's does
        not fit.
        """
        pair: tuple[Tensor, Tensor] | None = self.cache.get(layer)
        tokens = 0 if pair is None else pair[0].shape[2]
        if tokens != self.held:
            raise ValueError(
                f"the cache holds {tokens} tokens in layer {layer}, {self.held} in layer 0"
            )
        if pair is not None and pair[0].shape[0] != self.batch:
            raise ValueError(f"a batch of {self.batch} for a cache of batch {pair[0].shape[0]}")
        if pair is None or self.past == self.held:
            return pair
        keys, values = (tensor[:, :, self.held - self.past :] for tensor in pair)
        return keys, values

    def update(self, layer: int, pair: tuple[Tensor, Tensor]) -> None:
        """Keeps the layer's pair until the commit."""
        self.new[layer] = pair

    def slot(
        self, layer: int, shape: tuple[int, int, int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Room for keys and values of this shape, [B, H, T, D], behind those of the layer: the
        blocks that hold them, [B, H, capacity, D] each; the rest is to be written.
        """
        like = torch.empty(0, dtype=dtype, device="cpu")
        slot = Slot.longer(self.get(layer), shape, self.limit, like)
        self.update(layer, slot)
        return slot.blocks.keys, slot.blocks.values

    def commit(self) -> None:
        """Hands every pair to the cache."""
        for layer, pair in self.new.items():
            self.cache.update(layer, pair)
        if isinstance(self.cache, OwnCache):
            self.cache.seen += self.tokens
