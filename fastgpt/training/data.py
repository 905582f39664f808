"""Which windows of the text a step trains on: a function of the seed and the step alone.

So a checkpoint needs no state of the data, and any number of processes shares a step in the same
way.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from torch import Tensor

from fastgpt.training.tokens import TextError


def derived_seed(*numbers: int) -> int:
    """A seed for torch's generators that depends on all of these numbers."""
    return random.Random(repr(numbers)).getrandbits(63)


def to_device(batch: Tensor, device: torch.device | str) -> Tensor:
    """The batch on that device; a copy from the CPU to a GPU is not waited for."""
    if torch.device(device).type != "cuda":
        return batch.to(device)
    return (batch.pin_memory() if batch.is_cpu else batch).to(device, non_blocking=True)


class Windows:
    """A text's consecutive windows of context tokens; the last ones are for validation.

    Args:
        ids: [N] token ids, memory-mapped or not.
        context: tokens in a window.
        validation: the share of the ids, at their end, that is for validation.
        seed: of the order.

    Raises:
        TextError: the training or the validation part is too short for a window.
    """

    def __init__(self, ids: Tensor, context: int, validation: float, seed: int) -> None:
        train = len(ids) - max(context + 1, round(len(ids) * validation))
        if train < context + 1:
            raise TextError(
                f"the text has {len(ids)} tokens, too short for a context of {context}: that takes "
                f"at least {2 * context + 2}, half of them for validation"
            )
        self.context, self.seed = context, seed
        self._train, self._validation = ids[:train], ids[train:]
        self.train_size = (train - 1) // context
        self.validation_size = (len(self._validation) - 1) // context
        self._epoch, self._order = -1, torch.empty(0)

    def train(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Training windows number first to first + count: inputs and targets, [count, context].

        The numbers go on from epoch to epoch; each epoch has every window once, in a new order.
        """
        places = [divmod(number, self.train_size) for number in range(first, first + count)]
        return self._batch(self._train, [self._shuffled(*place) for place in places])

    def validation(self, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
        """The validation windows of these numbers: inputs and targets, [count, context]."""
        return self._batch(self._validation, numbers)

    def validation_sample(self, count: int) -> list[int]:
        """The numbers of at most count validation windows, evenly spaced."""
        count = min(count, self.validation_size)
        return [number * self.validation_size // count for number in range(count)]

    def _shuffled(self, epoch: int, place: int) -> int:
        """The window at this place of an epoch's order."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.train_size, generator=generator)
        return int(self._order[place])

    def _batch(self, ids: Tensor, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
        length = self.context
        rows = [ids[number * length : number * length + length + 1] for number in numbers]
        batch = torch.stack([row.long() for row in rows])
        # Copies: contiguous() would leave inputs and targets of a single row in shared memory.
        return batch[:, :-1].clone(), batch[:, 1:].clone()
