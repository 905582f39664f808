"""Which device to use."""

from __future__ import annotations

import os

import torch

from fastgpt.training.settings import SettingsError


def pick_device(name: str) -> torch.device:
    """The device of that name; for auto the best there is; of several GPUs, this process's.

    Raises:
        SettingsError: it is not to be had.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if has["cuda"] else "mps" if has["mps"] and _alone() else "cpu"
    if not has.get(name):
        raise SettingsError(f"device {name!r} is not to be had here; PyTorch finds no such device")
    if name != "cuda":
        return torch.device(name)
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= found:
        raise SettingsError(f"process {local} of this machine has no GPU left: it has {found}")
    return torch.device("cuda", local)


def _alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) <= 1
