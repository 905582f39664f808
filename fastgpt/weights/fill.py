"""Copies the tensors of a source into a model, after checking that every one fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastgpt.quantized_weight import QuantizedWeight, write_rows
from fastgpt.weights.files import Source, Stored
from fastgpt.weights.names import Entry, Shape, Style, WeightsError, expected

WINDOW = 32 << 20  # bytes of a file that are read at a time
SMALL_WINDOW = 2 << 20  # where what is read is far larger than what becomes of it

Parameters = Mapping[str, nn.Parameter]
Target: TypeAlias = Tensor | QuantizedWeight  # what is quantised while it is read


class Plan:
    """Which tensors of a source fill which parameters of a model with this config.

    Args:
        source: the tensors.
        style: of their names.
        cfg: the book's config.
        tied: whether a config says that the head is the token embedding; None if there is none.

    Raises:
        WeightsError: tensors are missing, unexpected or of the wrong shape; all are named.
    """

    def __init__(
        self, source: Source, style: Style, cfg: Mapping[str, Any], tied: bool | None
    ) -> None:
        self.source, stored = source, source.stored
        # Hugging Face and OpenAI don't store a head that is the token embedding.
        optional = tied if tied is not None else style.head != "out_head.weight"
        entries = expected(style, cfg, head_optional=optional)
        layers, square = cfg["n_layers"], (cfg["context_length"],) * 2
        masks = {style.mask.format(i): i for i in range(layers)} if style.mask else {}
        self.masks = {layer: name for name, layer in masks.items() if name in stored}
        shapes = {name: entry.shape for name, entry in entries.items()} | dict.fromkeys(
            masks, square
        )
        extra = [name for name in stored if name not in shapes]
        self._refuse(
            {
                "missing": [n for n, e in entries.items() if n not in stored and not e.optional],
                "unexpected": [name for name in extra if not style.is_ignored(name, layers)],
                "of the wrong shape": [
                    f"{name} {list(stored[name].shape)}, expected {list(shape)}"
                    for name, shape in shapes.items()
                    if name in stored and not _has_shape(stored[name].shape, shape)
                ],
                "not floating-point": [
                    f"{name} {stored[name].dtype}"
                    for name in entries
                    if name in stored and not _is_floating(stored[name])
                ],
            }
        )
        present = {name: entry for name, entry in entries.items() if name in stored}
        zeros = [name for name, entry in present.items() if not entry.targets]
        self._refuse({"not zero although qkv_bias is False": [n for n in zeros if self._any(n)]})
        self.tied = self._is_tied(style, tied)
        if self.tied:
            present.pop(style.head or "", None)
        self.fills = [(name, entry) for name, entry in present.items() if entry.targets]
        if self.tied:
            self.fills.append((style.tok, Entry(entries[style.tok].shape, ("out_head.weight",))))

    def check(self, parameters: Parameters) -> None:
        """Raises WeightsError if the model's parameters are not those that the source fills."""
        wrong: list[str] = []
        filled: set[str] = set()
        for name, entry in self.fills:
            filled.update(entry.targets)
            for key in entry.targets:
                held = parameters.get(key)
                if held is not None and held.shape != entry.part:
                    wrong.append(f"{key} {list(held.shape)}, but {name} has {list(entry.part)}")
        head, tok = (parameters.get(key) for key in ("out_head.weight", "tok_emb.weight"))
        if not self.tied and head is tok:
            wrong.append("out_head.weight and tok_emb.weight: one parameter, but two tensors")
        self._refuse(
            {
                "missing": [key for key in parameters if key not in filled],
                "unexpected": sorted(filled - parameters.keys()),
                "of the wrong shape": wrong,
            }
        )

    def edited_masks(self) -> dict[int, Tensor]:
        """The masks that are not causal, [context_length, context_length] each, by layer."""
        edited = {}
        for layer, name in self.masks.items():
            with self.source.opened() as read:
                mask = read(name)[:].clone()
            if not torch.equal(mask.bool(), torch.ones(mask.shape, dtype=torch.bool).triu(1)):
                edited[layer] = mask
        return edited

    def _any(self, name: str) -> bool:
        with self.source.opened() as read:
            return bool(read(name)[:].any())

    def _is_tied(self, style: Style, tied: bool | None) -> bool:
        stored = self.source.stored
        if style.head is None or style.head not in stored:
            return True
        if stored[style.head].place == stored[style.tok].place:
            return True
        if not tied:
            return False
        # If both are stored and differ, they are not tied, as in Hugging Face's loader.
        for a, b in _windows(stored[style.tok], stored[style.tok].shape, WINDOW):
            with self.source.opened() as read:
                if not torch.equal(read(style.tok)[a:b], read(style.head)[a:b]):
                    return False
        return True

    def _refuse(self, faults: Mapping[str, list[str]]) -> None:
        lists = ["\n    ".join((f"\n  {kind}:", *names)) for kind, names in faults.items() if names]
        if lists:
            raise WeightsError(f"{self.source.label} does not fit the model" + "".join(lists))


@torch.no_grad()
def copy(source: Source, fills: Sequence[tuple[str, Entry]], targets: Mapping[str, Target]) -> None:
    """Writes each tensor into the targets that it fills, in their dtype, on their device.

    Raises:
        WeightsError: a value of what is to be quantised is NaN or infinite.
    """
    # Pages once read stay resident while the file is mapped, so it is mapped again after
    # every twentieth of the model.
    narrow = any(not isinstance(targets[key], Tensor) for _, e in fills for key in e.targets)
    window = SMALL_WINDOW if narrow else WINDOW
    budget = max(window, sum(map(_nbytes, targets.values())) // 20)
    pieces = _pieces(source, fills, targets, window)
    piece = next(pieces, None)
    while piece is not None:
        left = budget
        with source.opened() as read:
            while piece is not None and left > 0:
                name, entry, a, b = piece
                rows = _rows(read(name), len(source.stored[name].shape), entry, a, b)
                _write(rows, entry, a, targets, source.label)
                left -= rows.nbytes
                del rows
                piece = next(pieces, None)


def _pieces(
    source: Source,
    fills: Sequence[tuple[str, Entry]],
    targets: Mapping[str, Target],
    window: int,
) -> Iterator[tuple[str, Entry, int, int]]:
    """Outputs a to b of every tensor."""
    written: set[int] = set()
    for name, entry in fills:
        places = {id(_values(targets[key])) for key in entry.targets}
        if not places <= written:  # a tied head is the token embedding
            shape = entry.shape[::-1] if entry.transposed else entry.shape
            yield from (
                (name, entry, a, b) for a, b in _windows(source.stored[name], shape, window)
            )
        written |= places


def _windows(stored: Stored, shape: Shape, window: int) -> Iterator[tuple[int, int]]:
    assert stored.dtype is not None
    step = max(1, window // max(1, stored.dtype.itemsize * math.prod(shape[1:])))
    return ((a, min(a + step, shape[0])) for a in range(0, shape[0], step))


def _rows(part: Any, dims: int, entry: Entry, a: int, b: int) -> Tensor:
    """Outputs a to b of a tensor of so many dimensions, [b - a, ...]."""
    leading = (0,) * (dims - len(entry.shape))
    if entry.transposed:
        columns: Tensor = part[(*leading, slice(None), slice(a, b))]
        return columns.t()
    rows: Tensor = part[(*leading, slice(a, b))]
    return rows


def _write(rows: Tensor, entry: Entry, a: int, targets: Mapping[str, Target], label: str) -> None:
    """Writes a tensor's outputs from a on into its targets."""
    n = entry.part[0]
    for i, key in enumerate(entry.targets):
        low, high = max(a, i * n), min(a + len(rows), (i + 1) * n)
        if low >= high:
            continue
        target, part = targets[key], rows[low - a : high - a]
        if isinstance(target, Tensor):
            target.data[low - i * n : high - i * n].copy_(part)
            continue
        try:
            write_rows(target, low - i * n, part)
        except ValueError as error:
            raise WeightsError(f"{label}: {key} cannot be quantised: {error}") from None


def _values(target: Target) -> Tensor:
    return target if isinstance(target, Tensor) else target.values


def _nbytes(target: Target) -> int:
    return target.nbytes if isinstance(target, Tensor) else sum(t.nbytes for t in target)


def _has_shape(shape: Shape, right: Shape) -> bool:
    """Whether the shapes are equal, apart from the leading 1 of OpenAI's matrices."""
    return shape == right or (len(right) == 2 and shape == (1, *right))


def _is_floating(stored: Stored) -> bool:
    return stored.dtype is not None and stored.dtype.is_floating_point
