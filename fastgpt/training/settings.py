"""What a run is asked to do: its settings, and configs, models and devices by their names."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from fastgpt.config import GPT2_SIZES, GPT_CONFIG_124M, check_config
from fastgpt.model.gpt import GPTModel

# GPT-2's sizes, and one that a laptop trains in minutes.
CONFIGS: dict[str, dict[str, Any]] = GPT2_SIZES | {
    "toy": GPT_CONFIG_124M
    | {"context_length": 64, "emb_dim": 64, "n_layers": 2, "n_heads": 4, "drop_rate": 0.0},
}


class SettingsError(ValueError):
    """A run can't do what it is asked to; the message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train. A step is one update of the weights."""

    steps: int  # 0: save the initial model
    batch: int = 8  # windows per step, over all processes
    micro_batch: int | None = None  # windows per pass of a process; None: its share of the batch
    lr: float = 4e-4  # the peak learning rate, after the warm-up
    min_lr: float = 4e-5  # the last learning rate, at the end of the cosine
    warmup: int | None = None  # steps; None: a tenth of all, at most 100
    weight_decay: float = 0.1  # of matrices only; biases and norms are not decayed
    clip: float = 1.0  # the largest norm of the gradients; 0: no clipping
    precision: str = "auto"  # float32, bfloat16 (autocast), auto: bfloat16 on GPUs that have it
    seed: int = 123
    validation: float = 0.1  # the share of the tokens, at their end, kept for validation
    eval_every: int = 100  # steps
    eval_batches: int = 8  # batches per evaluation
    checkpoint_every: int = 100  # steps
    keep: int = 2  # checkpoints
    sample: str | None = None  # the prompt of a sample after each evaluation; None: no sample
    sample_tokens: int = 50

    def __post_init__(self) -> None:
        for name in ("batch", "eval_every", "eval_batches", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} {getattr(self, name)} is below 1")
        for name, least in (("steps", 0), ("micro_batch", 1), ("warmup", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"{name} {value} is below {least}")
        if not 0 <= self.min_lr <= self.lr:
            raise SettingsError(f"min_lr {self.min_lr:g} is not between 0 and lr {self.lr:g}")
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
    except (ValueError, TypeError, KeyError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise SettingsError(f"config {name}: {reason}") from None
    return dict(cfg)


def check_token(what: str, token: int, cfg: dict[str, Any]) -> None:
    """Raises SettingsError if a model of this config has no such token."""
    if token >= cfg["vocab_size"]:
        raise SettingsError(
            f"{what} has token {token}, but the vocabulary has {cfg['vocab_size']} tokens"
        )


def load_model(name_or_path: str | Path) -> GPTModel:
    """The model that ``GPTModel.from_pretrained`` loads by this name or path, in train mode.

    Raises:
        SettingsError: there is no such model, or its files are broken.
    """
    try:
        return GPTModel.from_pretrained(name_or_path).train()
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
