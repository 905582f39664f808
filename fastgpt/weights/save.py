"""Writes a model so that Hugging Face's GPT2LMHeadModel loads it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastgpt.atomic_files import clear_unfinished, only_writer, sync_files, sync_folder
from fastgpt.weights import quantized
from fastgpt.weights.files import NEEDS_HUB
from fastgpt.weights.names import WeightsError, expected, hugging_face
from fastgpt.weights.sizes import Sizes, as_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SAVING = ".saving-"


def save_pretrained(
    sizes: Sizes, state: Mapping[str, Tensor], directory: str | os.PathLike[str]
) -> None:
    """Writes model.safetensors and config.json, as Hugging Face's GPT2LMHeadModel has them.

    Whenever the process ends, the folder holds the old pair of files or the new one; for a moment,
    if their configs differ, an incomplete pair, which ``from_pretrained`` refuses. The next save
    clears what an interrupted one left behind. Biases that the model lacks are written as zeros,
    with a note in config.json. A quantised model is written under the keys of its state dict, with
    an entry "quantization_config" in config.json, and only ``from_pretrained`` reads it.

    Args:
        sizes: of the model.
        state: its weights under the book's keys.
        directory: made if need be.

    Raises:
        WeightsError: Hugging Face's GPT-2 has no place for something in this model, or it is
            quantised in part; it is named.
        OSError: it cannot be written, and the old files stay; or the new ones are there, and the
            disk failed while they were flushed or what is left of the save removed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError(f"save_pretrained: {NEEDS_HUB}") from None
    state = {name: t for name, t in state.items() if not name.endswith("att.mask")}
    tensors = quantized.to_save(state, sizes) if sizes.quantization else _theirs(state, sizes)
    text = json.dumps(
        {**as_json(sizes), "dtype": str(state["pos_emb.weight"].dtype).removeprefix("torch.")},
        indent=2,
    )
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    with only_writer(place):
        clear_unfinished(place, SAVING)
        staging = place / f"{SAVING}{uuid.uuid4().hex}"
        staging.mkdir()
        try:
            save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
            (staging / CONFIG).write_text(text + "\n", encoding="utf-8")
            # safetensors makes it for its owner alone.
            shutil.copymode(staging / CONFIG, staging / WEIGHTS)
            sync_files(staging)
            _replace_weights(staging, place)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, SafetensorError):
                raise OSError(f"{place / WEIGHTS} cannot be written: {error}") from None
            raise
        try:
            sync_folder(place)
        finally:
            os.replace(staging / CONFIG, place / CONFIG)
            shutil.rmtree(staging)
        sync_folder(place)


def _replace_weights(staging: Path, place: Path) -> None:
    """Replaces the weights so that no end of the process leaves them beside another's config.

    Where the config stays as it was, replacing the weights is all there is. Where it doesn't, the
    folder has none until the weights are there, and ``cut_short`` tells why. An error brings the
    old config back.
    """
    config, old = place / CONFIG, staging / "old.json"
    try:
        if config.exists() and config.read_bytes() != (staging / CONFIG).read_bytes():
            os.replace(config, old)
            sync_folder(place)
        os.replace(staging / WEIGHTS, place / WEIGHTS)
    except BaseException:
        if (staging / WEIGHTS).exists():  # an interrupt may come when they have been replaced
            with contextlib.suppress(OSError):
                os.replace(old, config)
        raise


def cut_short(folder: Path) -> bool:
    """Whether the last ``save_pretrained`` into a folder ended between its two files."""
    return not (folder / CONFIG).exists() and any(folder.glob(f"{SAVING}*"))


def _theirs(state: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """The tensors under Hugging Face's names, contiguous, on the CPU."""
    entries = expected(hugging_face(), sizes.cfg)
    targets = [key for entry in entries.values() for key in entry.targets]
    faults = [f"{key} is missing" for key in targets if key not in state]
    faults += [f"{key} has no place there" for key in state if key not in targets]
    faults += [f"{key} is on the meta device" for key, tensor in state.items() if tensor.is_meta]
    tensors, dtype = {}, state["tok_emb.weight"].dtype if "tok_emb.weight" in state else None
    for name, entry in entries.items():
        if not all(key in state for key in entry.targets):
            continue
        faults += [
            f"{key} is {list(state[key].shape)}, not {list(entry.part)}"
            for key in entry.targets
            if state[key].shape != entry.part
        ]
        if faults:
            continue  # to name the others
        parts = [state[key].detach().cpu() for key in entry.targets]
        if entry.transposed:
            parts = [part.t() for part in parts]
        if not parts:
            tensors[name] = torch.zeros(entry.shape, dtype=dtype)
        elif len(parts) > 1:
            tensors[name] = torch.cat(parts, dim=-1)
        elif name != "lm_head.weight" or not sizes.tied:
            tensors[name] = parts[0].contiguous()
    refuse(faults)
    return tensors


def refuse(faults: list[str]) -> None:
    """
    Raises:
        WeightsError: there are faults, and these keep a model out of Hugging Face's GPT-2.
    """
    if faults:
        raise WeightsError("Hugging Face's GPT-2 cannot hold this model:\n  " + "\n  ".join(faults))
