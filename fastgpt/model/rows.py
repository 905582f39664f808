"""Sequences of different lengths that go on together, each in a row of its own with its own keys,
values and position: on the CPU by packed passes, on a GPU by a graph with a position a row.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.cpu.forward import PackedSequence, WholePass, few_rows
from fastgpt.model import decode_graph
from fastgpt.model.gpt import GPTModel

_MOST_TOKENS = 2048  # in a packed pass: its scratch memory grows with them


def packs(lengths: Sequence[int], most: int = _MOST_TOKENS) -> list[list[int]]:
    """The numbers of the sequences that go through one pass, for each pass.

    Each has the bits that it has alone: products of few rows and of many sum up in different
    orders, so a pass of many sequences holds only such as are long enough to be many by themselves.
    A pass has at most so many tokens, or one sequence.
    """
    limits = few_rows()
    found: list[list[int]] = []
    open_ones: dict[int, list[int]] = {}  # by the kind of pass
    for number, length in enumerate(lengths):
        kind = bisect_left(limits, length)
        pack = open_ones.get(kind)
        total = length if pack is None else length + sum(lengths[i] for i in pack)
        fits = bisect_left(limits, total) == kind and total <= most
        if pack is None or not fits or len(pack) == limits[0]:  # the head's rows are few
            pack = open_ones[kind] = []
            found.append(pack)
        pack.append(number)
    return found


class PackedRows:
    """On the CPU; each row's keys and values are one block, which goes with the row."""

    def __init__(self, model: GPTModel) -> None:
        self.model = model
        self._whole: WholePass | None = None
        self._caches: dict[int, PackedSequence] = {}  # by row, with the tokens so far as past

    def serves(self) -> bool:
        """Whether the model, as it is now, runs as packed passes."""
        with torch.no_grad():
            self._whole = packed_pass(self.model)
        return self._whole is not None

    def prefill(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int], capacities: Sequence[int]
    ) -> Tensor:
        """Logits [n, V] behind each of n prompts, which go on in these rows, each up to so many
        tokens.
        """
        whole = self._of_now()
        sizes = (len(whole.blocks), 2, whole.n_heads)
        for row, prompt, capacity in zip(rows, prompts, capacities, strict=True):
            shape = (*sizes, capacity, whole.width // whole.n_heads)
            cache = torch.empty(shape, dtype=whole.cache_dtype, device="cpu")
            self._caches[row] = PackedSequence(len(prompt), 0, cache)
        logits: dict[int, Tensor] = {}
        for pack in packs([len(prompt) for prompt in prompts]):
            found = self._run([prompts[i] for i in pack], [rows[i] for i in pack])
            logits |= zip(pack, found, strict=True)
        return torch.stack([logits[i] for i in range(len(rows))])

    def step(self, tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Logits [n, V] behind the next token of each of these rows."""
        most = few_rows()[0]
        parts = [
            self._run([[token] for token in tokens[at : at + most]], rows[at : at + most])
            for at in range(0, len(rows), most)
        ]
        return torch.cat(parts)

    def release(self, row: int) -> None:
        """Gives the row's keys and values back."""
        del self._caches[row]

    def _run(self, tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """Logits [n, V] behind these rows' next tokens, which join them."""
        new = [
            PackedSequence(len(ids), self._caches[row].past, self._caches[row].cache)
            for ids, row in zip(tokens, rows, strict=True)
        ]
        ids = torch.tensor(list(chain(*tokens)), dtype=torch.int64, device="cpu")
        logits = self._of_now().run_packed(ids, new, last_only=True)
        for row, (n, past, cache) in zip(rows, new, strict=True):
            self._caches[row] = PackedSequence(n, past + n, cache)
        return logits

    def _of_now(self) -> WholePass:
        assert self._whole is not None
        return self._whole


def packed_pass(model: GPTModel, with_head: bool = True) -> WholePass | None:
    """The model as passes of packed sequences on the CPU; None if a piece of it is modified or C++
    cannot read it.
    """
    whole = model.whole_pass(torch.zeros(1, 1, dtype=torch.int64, device="cpu"), with_head)
    if whole is None or not whole.in_one_call or whole.context < model.max_context():
        return None
    return whole


class GraphRows:
    """On a GPU, by the rows of a decoder."""

    def __init__(self, model: GPTModel, decoder: decode_graph.Decoder) -> None:
        self.model, self.decoder = model, decoder

    def serves(self) -> bool:
        """Whether a step of the model, as it is now, still is what was captured."""
        return self.decoder.serves(self.model)

    def prefill(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int], capacities: Sequence[int]
    ) -> Tensor:
        """Logits [n, V] behind each of n prompts, which go on in these rows."""
        return self.decoder.prefill(prompts, rows)

    def step(self, tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Logits [n, V] behind the next token of each of these rows."""
        state = self.decoder.state
        device, of_row = state.ids.device, dict(zip(rows, tokens, strict=True))
        ids = [of_row.get(row, 0) for row in range(len(state.ids))]  # any, where there is none
        logits = self.decoder.step(torch.tensor(ids, device=device))
        return logits[torch.tensor(rows, device=device)]

    def release(self, row: int) -> None:
        """Forgets the row's sequence."""
        self.decoder.release(row)


@contextlib.contextmanager
def rows_of(model: GPTModel, n: int, steps: int) -> Iterator[Any]:
    """Rows of this model, at most n at once, for about so many steps; None where it can't be run by
    rows.
    """
    pos = getattr(model.pos_emb, "weight", None)
    if not isinstance(pos, Tensor):
        yield None
    elif dispatch.on_triton("decode_attention", pos):
        with decode_graph.row_decoding(model, n, steps) as decoder:
            yield None if decoder is None else GraphRows(model, decoder)
    else:
        yield PackedRows(model) if pos.is_cpu else None
