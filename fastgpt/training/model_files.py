"""The models that the commands write and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.model import GPTModel
from fastgpt.training.settings import SettingsError


def save_model(model: GPTModel, folder: Path) -> None:
    """Writes config.json and model.safetensors, which Hugging Face's GPT-2 reads too."""
    model.save_pretrained(folder)


def load_model(name_or_path: str | Path) -> GPTModel:
    """The model, in train mode, of whatever ``GPTModel.from_pretrained`` takes.

    Raises:
        SettingsError: there is no model, or a broken one.
    """
    try:
        return GPTModel.from_pretrained(name_or_path).train()
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise SettingsError(" ".join(str(error).split())) from None


def filled(cfg: dict[str, Any], tensors: dict[str, Tensor]) -> GPTModel:
    """A model with these parameters; a head that isn't among them is tied to the embedding."""
    with torch.device("meta"):
        model = GPTModel(cfg)
    tied = "out_head.weight" not in tensors
    if tied:
        tensors = tensors | {"out_head.weight": tensors["tok_emb.weight"]}
    model.load_state_dict(tensors, assign=True)
    if tied:
        model.out_head.weight = model.tok_emb.weight
    return model.requires_grad_()
