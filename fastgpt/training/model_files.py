"""The models that the commands read."""

from __future__ import annotations

from pathlib import Path

from fastgpt.model.gpt import GPTModel
from fastgpt.training.settings import SettingsError


def load_model(name_or_path: str | Path) -> GPTModel:
    """The model, in train mode, of whatever ``GPTModel.from_pretrained`` takes.

    Raises:
        SettingsError: there is no model, or a broken one.
    """
    try:
        return GPTModel.from_pretrained(name_or_path).train()
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise SettingsError(" ".join(str(error).split())) from None
