"""Which pieces of a model run fused, as what, and what stands in the way of the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fastgpt import dispatch
from fastgpt.cpu.records import FORMATS
from fastgpt.model.fusable import Obstacle, drop_probability
from fastgpt.model.gpt import GPTModel
from fastgpt.model.modules import TransformerBlock


def explain(model: nn.Module) -> None:
    """Prints which pieces of a model run fused, as what, and what stands in the way of the rest
    (a hook, a replaced layer, dropout), one line a kind.
    """
    print("\n".join(_lines(model)))


def _lines(model: nn.Module) -> Iterator[str]:
    if not isinstance(model, GPTModel):
        yield f"{type(model).__name__} is not a fastgpt.GPTModel, so nothing of it runs fused."
        yield "fastgpt.accelerate(model) makes one over the book's model or Hugging Face's GPT-2."
        return
    weight = next((p for p in model.parameters() if p.dim() == 2), None)
    if weight is None:
        yield "The model has no weights."
        return
    backend, reason = dispatch.explained("linear", weight)
    if weight.dtype in FORMATS and dispatch.runs_whole(weight):
        backend, reason = "cpu", None
    kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    yield f"{kind}: backend {backend}" + (f" ({reason})" if reason else "")
    obstacles = model.obstacles()
    if backend == "cpu":
        obstacles += _unreadable(model)
        yield from _on_the_cpu(model, obstacles, weight.dtype)
    elif backend == "triton":
        yield "  operations fused one by one; generation by one CUDA graph a step if nothing below"
    else:
        yield "  PyTorch's own operations throughout"
    for line in _grouped(obstacles):
        yield f"  in the way: {line}"
    for path, dropout in model.named_modules():
        if isinstance(dropout, nn.Dropout) and drop_probability(dropout):
            yield "  in the way of the whole pass and of cached generation: dropout while training"
            yield f"    (first {path}; model.eval() ends it)"
            return


def _on_the_cpu(model: GPTModel, obstacles: list[Obstacle], dtype: torch.dtype) -> Iterator[str]:
    blocks: Any = list(model.trf_blocks)
    at = {o.path for o in obstacles}
    fused = [i for i in range(len(blocks)) if not any(_below(p, f"trf_blocks.{i}") for p in at)]
    ends = [n for n in ("tok_emb", "pos_emb", "final_norm", "out_head") if n not in at]
    whole = len(fused) == len(blocks) and len(ends) == 4
    share = f"{len(fused)} of {len(blocks)} blocks"
    if whole:
        yield "  without gradients: the whole pass is one call into C++"
    else:
        yield f"  without gradients: {', '.join([*ends, share])} in C++, the rest as modules"
    rest = "fused operations" if dtype is torch.float32 else "PyTorch's own operations"
    yield f"  with gradients: {share} as one operation each, the rest by {rest}"


def _below(path: str, of: str) -> bool:
    return path == of or path.startswith(f"{of}.")


def _unreadable(model: GPTModel) -> list[Obstacle]:
    """The blocks whose parameters C++ cannot read."""
    found = []
    for name, block in model.trf_blocks.named_children():
        record = block.record() if isinstance(block, TransformerBlock) else None
        if record is not None and (record.dtype not in FORMATS or not record.fields(record.dtype)):
            reason = "a parameter of another dtype, device, shape, layout or class"
            found.append(Obstacle(f"trf_blocks.{name}", reason))
    return found


def _grouped(obstacles: Iterable[Obstacle]) -> list[str]:
    """One line a kind: the same in several blocks is said once, with their numbers."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for path, reason in obstacles:
        match = re.fullmatch(r"trf_blocks\.(\d+)(.*)", path)
        if match:
            kinds.setdefault((match[2], reason), []).append(int(match[1]))
        else:
            kinds[path or "the model itself", reason] = []
    return [
        f"trf_blocks.{_ranges(numbers)}{path}: {reason}" if numbers else f"{path}: {reason}"
        for (path, reason), numbers in kinds.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2, 5}"; one number stays as it is."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    parts = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs]
    return parts[0] if len(numbers) == 1 else "{" + ", ".join(parts) + "}"
