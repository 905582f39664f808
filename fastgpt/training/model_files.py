"""A model in a folder: config.json and model.safetensors. What writes and reads one is all here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastgpt.model import GPTModel
from fastgpt.training.settings import SettingsError
from fastgpt.weights.save import CONFIG


def save_model(model: GPTModel, folder: Path) -> None:
    """Writes the model into a folder that ``load_model`` reads, and Hugging Face's GPT-2 too."""
    model.save_pretrained(folder)


def load_model(folder: Path) -> GPTModel:
    """The model in a folder of ``save_model``, or in any that ``GPTModel.from_pretrained`` reads.

    Raises:
        SettingsError: the folder holds no model, or a broken one.
    """
    if not (folder / CONFIG).is_file():
        raise SettingsError(f"{folder} holds no model: it has no {CONFIG}")
    try:
        return GPTModel.from_pretrained(folder).train()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{folder} holds no model that can be loaded: {reason}") from None


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
