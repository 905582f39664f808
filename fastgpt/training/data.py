"""Which windows of the text a step trains on: a function of the seed and the step alone.

So there is no state to save, any number of processes shares a step's windows in the same way, and
shuffling a text of any size takes no memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastgpt.training.tokens import TextError

MASK = (1 << 64) - 1
ROUNDS = 4


def mix(*numbers: int) -> int:
    """Some 64 bits that look random, the same for the same numbers (splitmix64, chained)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
        state ^= state >> 31
    return state


def shuffled(index: int, size: int, key: int) -> int:
    """Where index stands in the permutation of range(size) that key names.

    A Feistel network permutes the powers of four; what falls outside range(size) goes through it
    again until it falls inside.
    """
    bits = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << bits) - 1
    while True:
        left, right = index >> bits, index & low
        for number in range(ROUNDS):
            left, right = right, left ^ mix(key, number, right) & low
        index = left << bits | right
        if index < size:
            return index


class Windows:
    """A text's windows of context tokens, one behind another, the last part for validation.

    Args:
        ids: [N] token ids, memory-mapped or not.
        context: tokens in a window.
        validation: the share of the ids, at their end, that validates.
        seed: of the order.

    Raises:
        TextError: one of the two parts is too short for a window.
    """

    def __init__(self, ids: Tensor, context: int, validation: float, seed: int) -> None:
        train = len(ids) - max(context + 1, round(len(ids) * validation))
        if train < context + 1:
            raise TextError(
                f"the text has {len(ids)} tokens: too short for a context of {context}, which "
                f"takes at least {2 * context + 2}, half of them to validate"
            )
        self.context, self.seed = context, seed
        self._train, self._validation = ids[:train], ids[train:]
        self.train_size = (train - 1) // context
        self.validation_size = (len(self._validation) - 1) // context

    def train(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """The training windows number first to first + count of an endless row of epochs, each
        with every window once: inputs and targets, [count, context].
        """
        order = []
        for number in range(first, first + count):
            epoch, place = divmod(number, self.train_size)
            order.append(shuffled(place, self.train_size, mix(self.seed, epoch)))
        return self._batch(self._train, order)

    def validation(self, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
        """The validation windows of these numbers: inputs and targets, [count, context]."""
        return self._batch(self._validation, numbers)

    def validation_sample(self, count: int) -> list[int]:
        """At most count numbers of validation windows, spread evenly."""
        count = min(count, self.validation_size)
        return [number * self.validation_size // count for number in range(count)]

    def _batch(self, ids: Tensor, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
        length = self.context
        rows = [ids[number * length : number * length + length + 1] for number in numbers]
        batch = torch.stack([row.long() for row in rows])
        # Copies: contiguous() would leave a single row's two windows in the same memory.
        return batch[:, :-1].clone(), batch[:, 1:].clone()
