"""What a run is asked to do: its settings, and configs, models and devices by their names."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgpt.config import GPT2_SIZES, GPT_CONFIG_124M, check_config
from fastgpt.model.gpt import GPTModel

# GPT-2's sizes, and one that a laptop trains in minutes.
CONFIGS: dict[str, dict[str, Any]] = GPT2_SIZES | {
    "toy": GPT_CONFIG_124M
    | {"context_length": 64, "emb_dim": 64, "n_layers": 2, "n_heads": 4, "drop_rate": 0.0},
}


class SettingsError(ValueError):
    """A run can't do what it is asked to; the message is one line for the user."""


def _setting(help_text: str, default: Any = dataclasses.MISSING, least: float | None = None) -> Any:
    """A field of Settings, with what --help says about it and its least value."""
    return dataclasses.field(default=default, metadata={"help": help_text, "least": least})


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train: the options of `fastgpt train`, with their help and their least values.

    Raises:
        SettingsError: a value is out of range.
    """

    steps: int = _setting("updates of the weights, instead of --epochs", least=0)
    batch: int = _setting("windows per step, over all processes", 8, 1)
    micro_batch: int | None = _setting(
        "windows per pass of a process (its share of the batch)", None, 1
    )
    lr: float = _setting("peak learning rate", 4e-4, 0)
    min_lr: float = _setting("last learning rate (a tenth of --lr)", 4e-5, 0)
    warmup: int | None = _setting(
        "steps until --lr is reached (a tenth of all, at most 100)", None, 0
    )
    weight_decay: float = _setting("of matrices only", 0.1, 0)
    clip: float = _setting("largest norm of the gradients, 0: no clipping", 1.0, 0)
    precision: str = _setting("float32, bfloat16, or auto: bfloat16 on GPUs that have it", "auto")
    seed: int = _setting("for weights, order and dropout", 123)
    validation: float = _setting("share of the text, at its end, kept for validation", 0.1)
    eval_every: int = _setting("steps between evaluations", 100, 1)
    eval_batches: int = _setting("batches per evaluation", 8, 1)
    checkpoint_every: int = _setting("steps between checkpoints", 100, 1)
    keep: int = _setting("checkpoints to keep", 2, 1)
    sample: str | None = _setting("prompt of a sample after each evaluation", None)
    sample_tokens: int = _setting("tokens per sample", 50, 1)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata["least"]
            if value is not None and least is not None and not value >= least:
                raise SettingsError(f"{field.name} {value:g} is below {least}")
        if self.min_lr > self.lr:
            raise SettingsError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")
        if not 0 < self.validation < 1:
            raise SettingsError(f"validation {self.validation:g} is not between 0 and 1")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise SettingsError(f"precision {self.precision!r} is not auto, float32 or bfloat16")

    @property
    def warmup_steps(self) -> int:
        return min(100, self.steps // 10) if self.warmup is None else self.warmup


def read_config(name: str) -> dict[str, Any]:
    """A model's config: by its name in CONFIGS, or from a JSON file with the book's keys.

    Raises:
        SettingsError: the name is neither, or no model can have this config.
    """
    if name in CONFIGS:
        return dict(CONFIGS[name])
    path = Path(name)
    if not path.is_file():
        known = ", ".join(CONFIGS)
        raise SettingsError(f"config {name!r} is neither one of {known} nor a JSON file")
    try:
        cfg = json.loads(path.read_text(encoding="utf-8-sig"))
        check_config(cfg)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise SettingsError(f"config {name}: {reason}") from None
    return dict(cfg)


def check_token(what: str, token: int, cfg: dict[str, Any]) -> None:
    """Raises SettingsError if a model of this config has no such token."""
    if token >= cfg["vocab_size"]:
        raise SettingsError(
            f"{what} has token {token}, but the vocabulary has {cfg['vocab_size']} tokens"
        )


def check_trainable(model: nn.Module) -> None:
    """Raises SettingsError if no parameter requires a gradient."""
    if not any(p.requires_grad for p in model.parameters()):
        raise SettingsError(
            "nothing in this model can be trained: no parameter requires a gradient; a quantised "
            "model needs layers beside its own (LoRA), or train the one that it was made from"
        )


def load_model(name_or_path: str | Path, **options: Any) -> GPTModel:
    """The model that ``GPTModel.from_pretrained`` loads by this name or path, in train mode.

    Raises:
        SettingsError: there is no such model, or its files are broken.
    """
    try:
        return GPTModel.from_pretrained(name_or_path, **options).train()
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise SettingsError(" ".join(str(error).split())) from None


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is the best available; of several GPUs, this process's.

    Raises:
        SettingsError: it is not available.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        alone = int(os.environ.get("WORLD_SIZE", "1")) <= 1
        name = "cuda" if has["cuda"] else "mps" if has["mps"] and alone else "cpu"
    if not has.get(name):
        raise SettingsError(f"device {name!r} is not available: PyTorch finds no such device")
    if name != "cuda":
        return torch.device(name)
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= found:
        raise SettingsError(f"process {local} of this machine has no GPU: there are only {found}")
    return torch.device("cuda", local)
