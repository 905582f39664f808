"""A model in 8 or 4 bits, made from one in full precision."""

from __future__ import annotations

from typing import TypeVar

from fastgpt.model.gpt import GPTModel
from fastgpt.model.quantization import quantized_copy

Model = TypeVar("Model", bound=GPTModel)


def quantize(model: Model, precision: str, group: int = 32) -> Model:
    """A copy of the model whose linear layers hold their weights in 8 or 4 bits.

    Each nn.Linear of the blocks and the head becomes a ``QuantizedLinear``; an embedding that is
    tied to the head becomes a ``QuantizedEmbedding`` over the same tensors. Everything else is
    copied in its dtype. The copy is in eval mode, and its parameters do not require gradients: it
    is for inference, or to train layers beside the quantised ones (LoRA). The given model is left
    as it is. Weights are converted one by one: no second copy in full precision is made.

    Args:
        model: a ``fastgpt.GPTModel``, on any device, meta included.
        precision: "int8", with a scale for each row; "int8-dynamic", the same weights, with the
            layers' inputs rounded to 8 bits too; "int4", with a scale and a minimum for each group.
        group: 32 or 64 neighbouring weights, for "int4".

    Raises:
        TypeError: the model is not a ``fastgpt.GPTModel``, or has a layer that cannot be quantised:
            one with a hook, wrapped, of a subclass, or already quantised. The message names it.
        ValueError: there is no such precision or group, the group does not divide a layer's width,
            a weight has a value that is NaN or infinite, or parameters differ in dtype.
    """
    if not isinstance(model, GPTModel):
        raise TypeError(
            f"a {type(model).__name__} cannot be quantised, only a fastgpt.GPTModel: "
            "fastgpt.accelerate(model) makes one over the book's model or Hugging Face's GPT-2"
        )
    return quantized_copy(model, precision, group)
