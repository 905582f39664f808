"""The log-probabilities that a model gives to the tokens of texts, without padding and without a
block of logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgpt import ops
from fastgpt.config import as_id_list
from fastgpt.cpu.forward import PackedSequence, WholePass
from fastgpt.model.fusable import is_unmodified
from fastgpt.model.gpt import GPTModel
from fastgpt.model.rows import packed_pass, packs

_MOST_LOGITS = 256  # tokens whose logits are held at once, where the head does not do without


class _Window(NamedTuple):
    """The inputs [begin, end) of a text; those from `scored` on have not been scored before."""

    text: int
    begin: int
    scored: int
    end: int


def score(
    model: nn.Module,
    sequences: Sequence[Sequence[int] | Tensor],
    context_size: int | None = None,
    stride: int | None = None,
) -> list[Tensor]:
    """The log-probability of each token of each text, given those before it: what perplexity and
    evaluation harnesses are made of. ``-torch.cat(score(model, texts)).mean()`` is the loss per
    token.

    Texts of any lengths run several in a pass, without padding, each as it is alone. One that is
    longer than the context is scored in windows of context_size tokens that begin stride apart; in
    each only the tokens count that no earlier window had, so that each has at least
    context_size - stride tokens before it, but for the first window's. That is the usual sliding
    window (huggingface.co/docs/transformers/perplexity).

    Args:
        model: any module from ids [B, T] to logits [B, T, vocab_size]; its train or eval mode stays
            as it is, so set eval. One with hooks, replaced modules or dropout, or on a GPU, takes
            the texts one by one.
        sequences: lists of ids or 1-D tensors, each of at least one token.
        context_size: the most tokens that the model sees at once, by default its context length.
        stride: by default half the context_size.

    Returns:
        For a text of T tokens a tensor [T - 1] on the CPU, float32 (float64 for a model in that):
        of the second token, the third and so on. The first has nothing before it.

    Raises:
        TypeError: the ids are not integers.
        ValueError: a text holds no token or is not one sequence, or context_size or stride is out
            of its range.
        IndexError: an id is outside the vocabulary.
    """
    texts = [as_id_list(one, f"text {i}") for i, one in enumerate(sequences)]
    for text in texts:
        if min(text) < 0:  # the loss would pass over -100
            raise IndexError(f"token id {min(text)} is below 0")
    if context_size is None:
        if not isinstance(model, GPTModel):
            raise ValueError("context_size is needed: this model is not a fastgpt.GPTModel")
        context_size = model.max_context()
    elif context_size < 1 or (isinstance(model, GPTModel) and context_size > model.max_context()):
        raise ValueError(f"context_size {context_size} is below 1 or above the model's context")
    if stride is None:
        stride = max(1, context_size // 2)
    if not 1 <= stride <= context_size:
        raise ValueError(f"stride {stride} is not from 1 to the context_size {context_size}")
    windows = [
        w for i, text in enumerate(texts) for w in _windows(i, len(text), context_size, stride)
    ]
    with torch.no_grad():
        found = {window: scores.cpu() for window, scores in _scored(model, texts, windows)}
    of_text: list[list[Tensor]] = [[] for _ in texts]
    for window in windows:  # a pass may have taken a text's last one before its first
        of_text[window.text].append(found[window])
    nothing = torch.empty(0, dtype=torch.float32, device="cpu")
    return [torch.cat(parts) if parts else nothing.clone() for parts in of_text]


def _windows(text: int, tokens: int, context_size: int, stride: int) -> Iterator[_Window]:
    inputs, scored, begin = tokens - 1, 0, 0
    while scored < inputs:
        end = min(begin + context_size, inputs)
        yield _Window(text, begin, scored, end)
        scored, begin = end, begin + stride


def _scored(
    model: nn.Module, texts: Sequence[list[int]], windows: Sequence[_Window]
) -> Iterator[tuple[_Window, Tensor]]:
    """Each window with the log-probabilities of the tokens behind its inputs from `scored` on."""
    if not windows:
        return
    whole = None
    if isinstance(model, GPTModel):
        device = next((p.device for p in model.parameters()), None)
        if device is not None and device.type == "cpu":
            fused_head = _fuses_loss(model)
            whole = packed_pass(model, with_head=not fused_head)
    if whole is None:
        for window in windows:
            yield window, _alone(model, texts[window.text], window)
        return
    lengths = [window.end - window.begin for window in windows]
    for pack in packs(lengths) if fused_head else packs(lengths, _MOST_LOGITS):
        these = [windows[i] for i in pack]
        losses = _together(model, whole, fused_head, texts, these)
        parts = losses.neg().split([w.end - w.scored for w in these])
        yield from zip(these, parts, strict=True)


def _together(
    model: Any,
    whole: WholePass,
    fused_head: bool,
    texts: Sequence[list[int]],
    windows: Sequence[_Window],
) -> Tensor:
    """The loss of each scored token, one window's behind another's."""
    inputs = [texts[w.text][w.begin : w.end] for w in windows]
    ids = torch.tensor(list(chain(*inputs)), dtype=torch.int64, device="cpu")
    new = [texts[w.text][w.scored + 1 : w.end + 1] for w in windows]
    targets = torch.tensor(list(chain(*new)), dtype=torch.int64, device="cpu")
    rows = whole.run_packed(ids, [PackedSequence(len(one)) for one in inputs])
    if len(targets) < len(ids):
        is_new = [i >= w.scored for w in windows for i in range(w.begin, w.end)]
        rows = rows[torch.tensor(is_new, device="cpu")]
    if fused_head:
        weight = model.out_head.weight
        ops.check_targets(targets, weight.shape[0], -100)
        return ops.checked_linear_cross_entropy(rows, weight, targets, -100, "none", owner=model)
    return _cross_entropy(rows, targets)


def _alone(model: Any, text: list[int], window: _Window) -> Tensor:
    device = next((p.device for p in model.parameters()), None)
    ids = torch.tensor(text[window.begin : window.end + 1], dtype=torch.int64, device=device)
    inputs, targets = ids[None, :-1], ids[None, 1:]
    if isinstance(model, GPTModel):
        losses = model.loss(inputs, targets, reduction="none")[0]
    else:
        losses = _cross_entropy(model(inputs)[0], targets[0])
    return -losses[window.scored - window.begin :]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ops.check_targets(targets, logits.shape[-1], -100)
    return F.cross_entropy(logits, targets, reduction="none")


def _fuses_loss(model: GPTModel) -> bool:
    """Whether the head's logits need not be held."""
    head: Any = model.out_head
    return is_unmodified(head, nn.Linear) and "weight" in head._parameters and head.bias is None
