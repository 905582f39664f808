"""The files of a model in 8 or 4 bits: its own tensors under the keys of its state dict."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastgpt.quantized_weight import empty_weight, named_tensors
from fastgpt.weights.files import Source
from fastgpt.weights.names import Entry, Shape, WeightsError, expected, style_of
from fastgpt.weights.sizes import Sizes

_BOOK = style_of(["tok_emb.weight"])
_TABLES = ("tok_emb.weight", "pos_emb.weight")


def check_source(source: Source, sizes: Sizes) -> list[tuple[str, Entry]]:
    """What fills which parameters and buffers of a model of these sizes.

    Raises:
        WeightsError: tensors are missing, unexpected, or of the wrong shape or dtype.
    """
    found = {name: (stored.shape, stored.dtype) for name, stored in source.stored.items()}
    _compare(f"{source.label} does not fit the model", found, sizes)
    return [(name, Entry(shape, (name,))) for name, (shape, _) in found.items()]


def to_save(state: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """The tensors to write, on the CPU; of an embedding that is tied to the head, the head's.

    Raises:
        WeightsError: the model is not as ``fastgpt.quantize`` makes it, or it is on meta.
    """
    if sizes.tied:
        state = {name: t for name, t in state.items() if not name.startswith("tok_emb.")}
    found = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
    _compare("the quantised model cannot be saved", found, sizes)
    if any(t.is_meta for t in state.values()):
        raise WeightsError("the quantised model cannot be saved: it is on the meta device")
    return {name: t.detach().cpu().contiguous() for name, t in state.items()}


def _compare(
    label: str, found: Mapping[str, tuple[Shape, torch.dtype | None]], sizes: Sizes
) -> None:
    right = _tensors(sizes)
    faults = [f"{name} is missing" for name in right if name not in found]
    faults += [f"{name} has no place there" for name in found if name not in right]
    for name in found.keys() & right.keys():
        (shape, dtype), like = found[name], right[name]
        if shape != tuple(like.shape):
            faults.append(f"{name} is {list(shape)}, not {list(like.shape)}")
        fits = dtype is not None and dtype.is_floating_point and name.endswith(_ANY_FLOAT)
        if dtype != like.dtype and not fits:
            faults.append(f"{name} is {dtype}, not {like.dtype}")
    if faults:
        raise WeightsError(f"{label}:\n  " + "\n  ".join(sorted(faults)))


_ANY_FLOAT = (".bias", ".shift", "norm1.scale", "norm2.scale", "final_norm.scale", *_TABLES)


def _tensors(sizes: Sizes) -> dict[str, Tensor]:
    """Every tensor of such a model, on meta, by its name; norms and biases in float32."""
    assert sizes.quantization is not None
    assert _BOOK is not None
    precision, group = sizes.quantization
    tensors = {}
    for name, entry in expected(_BOOK, sizes.cfg).items():
        if name == "tok_emb.weight" and sizes.tied:
            continue
        if len(entry.shape) == 1 or name in _TABLES:
            tensors[name] = torch.empty(entry.shape, dtype=torch.float32, device="meta")
            continue
        weight = named_tensors(empty_weight(precision, entry.shape, group, "meta"))
        path = name.removesuffix("weight")
        tensors |= {path + field: tensor for field, tensor in weight.items()}
    return tensors
