"""Writes a model so that Hugging Face's GPT2LMHeadModel loads it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.atomic_files import clear_unfinished, only_writer, sync_files, sync_folder
from fastgpt.weights.files import NEEDS_HUB
from fastgpt.weights.names import WeightsError, expected, hugging_face
from fastgpt.weights.sizes import Sizes, as_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SAVING = ".saving-"


def save_pretrained(
    model: Any,
    directory: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes model.safetensors and config.json, as Hugging Face's GPT2LMHeadModel has them.

    Whenever the process ends, the folder holds the old pair of files or the new one; for a moment,
    where their configs differ, a pair that isn't complete, which ``from_pretrained`` refuses.
    The next save clears what one cut short left behind. Biases that the model has not are written
    as zeros, with a note in config.json.

    Args:
        model: a ``GPTModel``.
        directory: made if need be.
        state_dict: the weights under the book's keys, where the model itself does not hold them
            whole (FSDP).

    Raises:
        WeightsError: Hugging Face's GPT-2 has no place for something in this model; it is named.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError(f"save_pretrained: {NEEDS_HUB}") from None
    state = dict(model.named_parameters(remove_duplicate=False)) if state_dict is None else {}
    state = {name: t for name, t in (state_dict or state).items() if not name.endswith("att.mask")}
    sizes = described(model)
    tensors = _theirs(state, sizes)
    text = json.dumps(
        {**as_json(sizes), "dtype": str(state["tok_emb.weight"].dtype).removeprefix("torch.")},
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
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _put_in_place(staging, place)
        shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(staging: Path, place: Path) -> None:
    """Replaces the pair of files so that no end of the process leaves one of each.

    Where the config stays as it was, replacing the weights is all there is. Where it doesn't, the
    folder has none until the weights are there, and ``cut_short`` tells why.
    """
    config = place / CONFIG
    if not config.is_file() or config.read_bytes() != (staging / CONFIG).read_bytes():
        config.unlink(missing_ok=True)
        sync_folder(place)
    os.replace(staging / WEIGHTS, place / WEIGHTS)
    sync_folder(place)
    os.replace(staging / CONFIG, config)
    sync_folder(place)


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
    _refuse(faults)
    return tensors


def described(model: Any) -> Sizes:
    """The sizes of a ``GPTModel``, read from its modules.

    Raises:
        WeightsError: a part of it is not as in GPT-2.
    """
    from fastgpt.model.gpt import GPTModel
    from fastgpt.model.modules import (
        GELU,
        FeedForward,
        MultiHeadAttention,
        TransformerBlock,
        is_causal,
    )

    if not isinstance(model, GPTModel):
        raise TypeError(f"save_pretrained takes a fastgpt.GPTModel, not a {type(model).__name__}")
    faults: list[str] = []
    heads: set[int] = set()
    epsilons: set[float] = set()
    drops: set[tuple[float, float]] = set()
    block: Any
    for i, block in enumerate(model.trf_blocks):
        name = f"trf_blocks.{i}"
        pieces = (block, getattr(block, "att", None), getattr(block, "ff", None))
        classes = (TransformerBlock, MultiHeadAttention, FeedForward)
        if not all(map(isinstance, pieces, classes)):
            kinds = ", ".join(type(piece).__name__ for piece in pieces)
            faults.append(f"{name} is not a block of the book's, but {kinds}")
            continue
        act = block.ff.layers[1]
        if not isinstance(act, GELU) and getattr(act, "approximate", None) != "tanh":
            faults.append(f"{name}.ff.layers.1 is a {type(act).__name__}, not the tanh GELU")
        mask = block.att._buffers.get("mask")
        if mask is not None and not is_causal(mask):
            faults.append(f"{name}.att.mask is edited")
        heads.add(block.att.num_heads)
        epsilons |= {getattr(norm, "eps", 0.0) for norm in (block.norm1, block.norm2)}
        drops.add((_p(block.att.dropout), _p(block.drop_shortcut)))
    epsilons.add(getattr(model.final_norm, "eps", 0.0))
    for what, values in (("heads", heads), ("eps of the norms", epsilons), ("dropout", drops)):
        if len(values) > 1:
            faults.append(f"{what} differ: {', '.join(map(str, values))}")
    for name in ("tok_emb", "pos_emb"):
        table = getattr(model, name)
        if not isinstance(table, nn.Embedding):
            faults.append(f"{name} is a {type(table).__name__}, not nn.Embedding")
    _refuse(faults)
    rate = model.cfg["drop_rate"]
    attention, shortcut = drops.pop() if drops else (rate, rate)
    cfg = {
        "vocab_size": model.tok_emb.weight.shape[0],
        "context_length": model.pos_emb.weight.shape[0],
        "emb_dim": model.tok_emb.weight.shape[1],
        "n_heads": heads.pop() if heads else model.cfg["n_heads"],
        "n_layers": len(model.trf_blocks),
        "drop_rate": shortcut,
        "qkv_bias": any(".att.W_" in n and n.endswith("bias") for n, _ in model.named_parameters()),
    }
    tied = getattr(model.out_head, "weight", None) is model.tok_emb.weight
    return Sizes(cfg, epsilons.pop(), (_p(model.drop_emb), attention, shortcut), tied)


def _p(dropout: nn.Module) -> float:
    return float(getattr(dropout, "p", 0.0))


def _refuse(faults: list[str]) -> None:
    if faults:
        raise WeightsError("Hugging Face's GPT-2 cannot hold this model:\n  " + "\n  ".join(faults))
