"""A whole forward pass in one call into C++, without gradients, from the live parameters.

The pass is a row of pieces: embeddings, blocks, the end. Neighbours that C++ can read run in one
call; any other piece is called as what it is, between two of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import batch_invariance
from fastgpt.config import check_ids
from fastgpt.cpu import _C
from fastgpt.cpu.records import (
    FORMATS,
    BlockRecord,
    EmbeddingRecord,
    EndRecord,
    linear_fields,
    n_rows,
    norm_fields,
    numbers,
    readable,
    threads_for,
    weight_fields,
)
from fastgpt.cpu.workspace import on_large_pages, workspace
from fastgpt.quantized_weight import Int4Weight

_FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults
FEW_QUERIES = 8  # of a sequence, up to which the attention takes each by itself (csrc)
_NO_NORM = (0,) * 4
_NO_LINEAR = (0,) * 12
_NO_TABLES = (0,) * 10

Fields = tuple[int, ...]


class PackedSequence(NamedTuple):
    """One of several texts in one pass: how many tokens of it come, behind how many cached ones.

    cache: [n_blocks, 2, n_heads, capacity, head_dim] of the pass's ``cache_dtype``, keys and then
    values, which the new tokens join; None, for all sequences of a pass, without one.
    """

    tokens: int
    past: int = 0
    cache: Tensor | None = None


class Piece(NamedTuple):
    """A part of a model: its record, None if it has to be called, and how to call it."""

    record: Any
    call: Callable[..., Tensor]


class WholePass:
    """The pieces of a model, looked at once, to be run while nothing changes them.

    Args:
        owner: what the scratch memory is kept with between calls, such as the model.
        embeddings: with an ``EmbeddingRecord``; called with the ids [B, T] and the number of cached
            tokens, it gives the residual stream [B, T, D].
        blocks: with a ``BlockRecord`` each; called with the stream, and the cache and the layer's
            number if there is a cache, they give the next.
        end: with an ``EndRecord``; called with the stream, it gives the result.
        autocast: whether products may take bfloat16 factors, as autocast to it has them.

    The stream is float32 in C++; a piece that is called gets and gives the parameters' dtype.
    """

    def __init__(
        self,
        owner: object,
        embeddings: Piece,
        blocks: Sequence[Piece],
        end: Piece,
        autocast: bool = False,
    ) -> None:
        self.owner, self.embeddings, self.blocks, self.end = owner, embeddings, blocks, end
        first: BlockRecord | None = next((b.record for b in blocks if b.record is not None), None)
        dtype = None if first is None else first.dtype
        self.fuses = dtype in FORMATS
        self.in_one_call = False  # whether every piece is one that C++ can read
        if first is None or dtype not in FORMATS:
            return
        self.width, self.n_heads, self.eps = first.width, first.n_heads, first.eps
        self.dtype, self.autocast = dtype, autocast
        product_dtype = torch.bfloat16 if autocast else self.dtype
        self.cache_dtype = product_dtype
        self.result_dtype = self.dtype if end.record and not end.record.head else product_dtype
        self._tables = self._embedding_fields(embeddings.record)
        self._blocks = [self._block_fields(piece.record) for piece in blocks]
        self._end = self._end_fields(end.record)
        self.in_one_call = None not in (self._tables, *self._blocks, self._end)
        if self.in_one_call:  # the most tokens of a sequence
            contexts = [piece.record.context_length for piece in blocks]
            self.context = min(embeddings.record.pos.shape[0], *contexts)

    def _embedding_fields(self, record: EmbeddingRecord | None) -> Fields | None:
        if record is None:
            return None
        tok = weight_fields(record.tok, self.dtype, self.width, n_rows(record.tok))
        pos = numbers(record.pos, self.dtype, record.pos.shape[0], self.width)
        whole = tok is not None and tok[1:3] == (self.width, 1)
        return None if not whole or pos is None else (*tok, *pos)  # type: ignore[misc]

    def _block_fields(self, record: BlockRecord | None) -> Fields | None:
        if record is None or record.attention_p or record.shortcut_p:
            return None
        if (record.width, record.n_heads, record.eps) != (self.width, self.n_heads, self.eps):
            return None
        return record.fields(self.dtype)

    def _end_fields(self, record: EndRecord | None) -> tuple[Fields, Fields] | None:
        if record is None or record.eps != self.eps:
            return None
        head: Fields | None = _NO_LINEAR
        if record.head is not None:
            head = linear_fields(*record.head, self.dtype, self.width, n_rows(record.head.weight))
        norm = norm_fields(record.norm, self.dtype, self.width)
        return None if norm is None or head is None else (norm, head)

    @functools.cached_property
    def rows_alike(self) -> int:
        """The most tokens of a sequence that have the bits in one pass that they have one by one;
        0 where that is not known.
        """
        if not self.in_one_call:
            return 0
        if batch_invariance.asked():
            return FEW_QUERIES
        head = self.end.record.head
        weights = [self.embeddings.record.tok, None if head is None else head.weight]
        weights += [part for block in self.blocks for part in block.record.parameters.flat()]
        return 2 if any(isinstance(weight, Int4Weight) for weight in weights) else FEW_QUERIES

    def run(self, ids: Tensor, past: int = 0, cache: Any = None, last_only: bool = False) -> Tensor:
        """The result for all tokens or the last, [B, T or 1, ...].

        ids: [B, T] int32 or int64, B and T at least 1, behind `past` cached tokens. cache: keeps
        the layers' keys and values in its ``slot``, and is handed to what is called.

        Raises:
            IndexError: an id is outside the vocabulary.
        """
        stream = _Stream(self, ids.contiguous(), past)
        if self._tables is not None:
            check_ids(ids, n_rows(self.embeddings.record.tok))
            stream.tables = self._tables
        else:
            stream.take(self.embeddings.call(ids, past))
        for layer, (piece, fields) in enumerate(zip(self.blocks, self._blocks, strict=True)):
            reaches = past + ids.shape[1]
            if fields is None or reaches > piece.record.context_length or not stream.fits:
                x = stream.flush()
                stream.take(piece.call(x) if cache is None else piece.call(x, cache, layer))
            else:
                stream.add(fields, piece.record, layer, cache)
        if self._end is not None and stream.fits:
            return stream.finish(*self._end, last_only)
        x = stream.flush()
        return self.end.call(x[:, -1:] if last_only else x)

    def run_packed(
        self, ids: Tensor, sequences: Sequence[PackedSequence], last_only: bool = False
    ) -> Tensor:
        """The result for sequences of different lengths, without padding; each as it is alone. Of
        every token, [N, ...], or of each sequence's last, [sequences, ...].

        Only where the pass runs ``in_one_call``. ids: [N], int32 or int64, all the sequences' new
        tokens one behind another; none of the sequences may be longer than a block's context.

        Raises:
            IndexError: an id is outside the vocabulary.
        """
        check_ids(ids, n_rows(self.embeddings.record.tok))
        stream = _Stream(self, ids.contiguous()[None], 0, sequences)
        stream.tables = self._tables
        for piece, fields in zip(self.blocks, self._blocks, strict=True):
            assert fields is not None
            stream.add(fields, piece.record, 0, None)
        assert self._end is not None
        return stream.finish(*self._end, last_only)


class _Stream:
    """One run: what has gathered for the next call, and the residual stream before it.

    The stream is this run's own: what a piece gave is copied first, what a piece gets is fresh.
    """

    def __init__(
        self, whole: WholePass, ids: Tensor, past: int, packed: Sequence[PackedSequence] = ()
    ) -> None:
        self.whole, self.ids, self.past = whole, ids, past
        self.sequences = _sequence_fields(packed) if packed else None
        self.x: Tensor | None = None
        self.tables: Fields | None = None
        self.blocks: list[int] = []
        self.n_blocks = self.hidden = self.capacity = 0
        self.fits = True  # whether a call can go on from it; a piece may have changed its form

    def take(self, x: Any) -> None:
        """Goes on from what a piece gave; in C++ only if the next piece would take it."""
        shape = (*self.ids.shape, self.whole.width)
        dtypes = (self.whole.dtype, self.whole.cache_dtype)
        self.fits = any(readable(x, dtype, *shape) for dtype in dtypes)
        self.x = x.float() if self.fits else x

    def add(self, fields: Fields, record: BlockRecord, layer: int, cache: Any) -> None:
        """Gathers a block; its keys and values go to the cache."""
        at = (0, 0)
        if cache is not None:
            B, T = self.ids.shape
            heads = self.whole.n_heads
            shape = (B, heads, self.past + T, record.width // heads)
            keys, values = cache.slot(layer, shape, self.whole.cache_dtype)
            if self.n_blocks and keys.shape[2] != self.capacity:  # one capacity a call
                self.call_blocks()
            self.capacity = keys.shape[2]
            at = keys.data_ptr(), values.data_ptr()
        self.blocks += (*fields, *at)
        self.n_blocks += 1
        self.hidden = max(self.hidden, n_rows(record.parameters.up.weight))

    def call_blocks(self) -> None:
        """Runs what has gathered."""
        if self.tables or self.blocks:
            self._call(None, _NO_NORM, _NO_LINEAR, last_only=False)

    def flush(self) -> Tensor:
        """The residual stream, [B, T, width] in the parameters' dtype, once what has gathered has
        run.
        """
        self.call_blocks()
        assert self.x is not None
        return self.x.to(self.whole.dtype) if self.fits else self.x

    def finish(self, norm: Fields, head: Fields, last_only: bool) -> Tensor:
        """Runs what has gathered, the norm and the head. Returns [B, T or 1, n_out or width], of
        packed sequences [N or n, n_out or width].
        """
        B, T = self.ids.shape
        n_out = self.whole.width if head is _NO_LINEAR else head[-2]
        dtype = self.whole.result_dtype
        shape = (B, 1 if last_only else T)
        if self.sequences is not None:
            shape = (len(self.sequences) if last_only else T,)  # type: ignore[assignment]
        out = torch.empty(*shape, n_out, dtype=dtype, device="cpu")
        on_large_pages(out)
        self._call(out, norm, head, last_only)
        return out

    def _call(self, out: Tensor | None, norm: Fields, head: Fields, last_only: bool) -> None:
        (B, T), width, heads = self.ids.shape, self.whole.width, self.whole.n_heads
        x = None
        if self.tables is None:
            assert self.x is not None
            x = self.x.clone(memory_format=torch.contiguous_format)
        elif out is None:
            x = torch.empty(B, T, width, **_FLOAT32)
        sizes = (B, T, self.past, self.capacity, width, heads, width // heads, self.hidden)
        ids = (self.ids.data_ptr() if self.tables else 0, int(self.ids.dtype is torch.int64))
        whole = self.whole
        formats = (FORMATS[whole.result_dtype], FORMATS[whole.cache_dtype], int(whole.autocast))
        result = (out.data_ptr() if out is not None else 0, *formats, int(last_only))
        packed = (0, 0)
        if self.sequences is not None:
            packed = self.sequences.data_ptr(), len(self.sequences)

        def fields(at_x: int, at_workspace: int) -> list[int]:
            rest = (*result, at_workspace, self.n_blocks, *packed)
            return [*sizes, *ids, *(self.tables or _NO_TABLES), at_x, *norm, *head, *rest]

        rows = B * T
        work = rows * width * (self.n_blocks * (4 * width + 2 * self.hidden) + head[-2])
        threads = threads_for(work)
        stream = 0 if x is not None else rows * width
        floats = stream + _C.forward_workspace(fields(0, 0), threads)
        with workspace(self.whole.owner, floats) as start:
            at_x = x.data_ptr() if x is not None else start
            _C.forward(fields(at_x, start + 4 * stream), self.blocks, self.whole.eps, threads)
        self.x, self.tables, self.blocks, self.n_blocks = x, None, [], 0


def _sequence_fields(packed: Sequence[PackedSequence]) -> Tensor:
    """An array of struct Sequence: [sequences, 5]."""
    rows, first = [], 0
    for tokens, past, cache in packed:
        at = (0, 0) if cache is None else (cache.shape[3], cache.data_ptr())
        rows.append((first, tokens, past, *at))
        first += tokens
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def few_rows() -> tuple[int, ...]:
    """Up to how many rows products sum up as those of few rows, ascending: of column-major and of
    row-major weights. Below, between and above these a row has the same bits in every pass.
    """
    return tuple(sorted((_C.few_rows(False), _C.few_rows(True))))
