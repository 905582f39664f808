"""Query, key and value side by side on a GPU, where they are one product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastgpt.model.fusable import is_unmodified_linear
from fastgpt.ops.packed_linear import lay_side_by_side


def weights_lie_at(layers: Sequence[Any]) -> dict[nn.Parameter, int]:
    """The addresses of the layers' weights."""
    weights = [layer.weight for layer in layers if is_unmodified_linear(layer)]
    return {w: w.data_ptr() for w in weights if type(w) is nn.Parameter}


def pack_on_gpu(layers: Sequence[Any], before: Mapping[nn.Parameter, int]) -> None:
    """Lays the layers' weights side by side where they have just come to a GPU: nobody else can
    hold their memory yet. They stay the parameters that they are.

    before: where they were, as ``weights_lie_at`` says it.
    """
    if not all(map(is_unmodified_linear, layers)):
        return
    weights = [layer.weight for layer in layers]
    first = weights[0]
    if not all(
        type(w) is nn.Parameter
        and w.is_cuda
        and (w.device, w.dtype, w.shape) == (first.device, first.dtype, first.shape)
        and w.data_ptr() != before.get(w)
        # Alone in its storage; or, from pickle, in a copy of the whole block.
        and w.untyped_storage().nbytes() in (w.nbytes, len(weights) * w.nbytes)
        for w in weights
    ):
        return
    if len({w.untyped_storage().data_ptr() for w in weights}) == len(weights):
        lay_side_by_side(weights)
