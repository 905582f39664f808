"""What a run is asked to do, and the sizes of models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fastgpt.config import GPT2_SIZES, GPT_CONFIG_124M, check_config

# GPT-2's, and one that a laptop trains in minutes.
CONFIGS: dict[str, dict[str, Any]] = GPT2_SIZES | {
    "toy": GPT_CONFIG_124M
    | {"context_length": 64, "emb_dim": 64, "n_layers": 2, "n_heads": 4, "drop_rate": 0.0},
}


class SettingsError(ValueError):
    """Settings that can't be carried out; the message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train. A step is one update of the weights."""

    steps: int  # 0: the model is saved as it starts
    batch: int = 8  # windows of a step, on all processes together
    micro_batch: int | None = None  # windows that a process takes at once; None: all its own
    lr: float = 4e-4  # the largest learning rate, after the warm-up
    min_lr: float = 4e-5  # the last, at the end of the cosine
    warmup: int | None = None  # steps; None: a tenth of all, at most 100
    weight_decay: float = 0.1  # of matrices; not of biases and norms
    clip: float = 1.0  # the largest norm of the gradients; 0: as they come
    precision: str = "auto"  # float32, bfloat16 (autocast), auto: bfloat16 on GPUs that have it
    seed: int = 123
    validation: float = 0.1  # the share of the tokens, at their end, that is not trained on
    eval_every: int = 100  # steps
    eval_batches: int = 8  # batches of an evaluation
    checkpoint_every: int = 100  # steps
    keep: int = 2  # checkpoints
    sample: str | None = None  # what the sample after each evaluation goes on from
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
            raise SettingsError(f"min_lr {self.min_lr:g} is not from 0 to lr {self.lr:g}")
        if not 0 < self.validation < 1:
            raise SettingsError(f"validation {self.validation:g} is not between 0 and 1")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise SettingsError(f"precision {self.precision!r} is not auto, float32 or bfloat16")

    @property
    def warmup_steps(self) -> int:
        return min(100, self.steps // 10) if self.warmup is None else self.warmup


def read_config(name: str) -> dict[str, Any]:
    """A model's config by its name in CONFIGS, or from a JSON file with the book's keys.

    Raises:
        SettingsError: there is neither, or the file makes no model.
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
