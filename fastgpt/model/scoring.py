"""The log-probabilities that a model gives to the tokens of texts, without padding and without a
block of logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgpt import dispatch, ops
from fastgpt.config import as_id_list, check_ids
from fastgpt.cpu.forward import PackedSequence, WholePass
from fastgpt.cpu.records import n_rows
from fastgpt.model.fusable import is_unmodified
from fastgpt.model.gpt import GPTModel
from fastgpt.model.rows import packed_pass, packs
from fastgpt.model.token_pass import Parts, features_of, logits_behind, packed, parts_of

_MOST_LOGITS = 256  # tokens whose logits are held at once, where the head does not do without
_MOST_ON_GPU = 8192  # tokens in a pass there: enough for every multiprocessor


class _Window(NamedTuple):
    """The inputs [begin, end) of a text; those from `scored` on have not been scored before."""

    text: int
    begin: int
    scored: int
    end: int


@dispatch.falls_back
def score(
    model: nn.Module,
    sequences: Sequence[Sequence[int] | Tensor],
    context_size: int | None = None,
    stride: int | None = None,
) -> list[Tensor]:
    """The log-probability of each token of each text, given those before it: what perplexity and
    evaluation harnesses are made of. ``-torch.cat(score(model, texts)).mean()`` is the loss per
    token.

    Texts of any lengths run several in a pass, without padding. On the CPU each has the bits that
    it has alone; on a GPU sums are rounded differently by the number of tokens. A text that is
    longer than the context is scored in windows of context_size tokens that begin stride apart; in
    each only the tokens count that no earlier window had, so that each has at least
    context_size - stride tokens before it, but for the first window's. That is the usual sliding
    window (huggingface.co/docs/transformers/perplexity).

    Args:
        model: any module from ids [B, T] to logits [B, T, vocab_size]; its train or eval mode stays
            as it is, so set eval. With hooks, replaced modules or dropout it takes the texts one
            by one.
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
    passes = _passes(model) if isinstance(model, GPTModel) else None
    if passes is None:
        for window in windows:
            yield window, _alone(model, texts[window.text], window)
        return
    for pack in passes.packs([w.end - w.begin for w in windows]):
        these = [windows[i] for i in pack]
        inputs = [texts[w.text][w.begin : w.end] for w in these]
        targets = [texts[w.text][w.scored + 1 : w.end + 1] for w in these]
        losses = passes.losses(inputs, list(chain(*targets)), _last_of_each(inputs, targets))
        yield from zip(these, losses.neg().cpu().split(list(map(len, targets))), strict=True)


def _last_of_each(inputs: Sequence[list[int]], targets: Sequence[list[int]]) -> list[int]:
    """The numbers, among all inputs, of those that have a target: the last of each text."""
    ends = accumulate(map(len, inputs))
    return [i for end, new in zip(ends, targets, strict=True) for i in range(end - len(new), end)]


def _passes(model: GPTModel) -> _OnCpu | _OnGpu | None:
    """Passes of several texts; None where the model takes them one by one."""
    embedding = getattr(model.pos_emb, "weight", None)
    if not isinstance(embedding, Tensor):
        return None
    if dispatch.on_triton("embedding", embedding):
        parts = parts_of(model)
        if parts is None or not (parts.packs_on_triton() and parts.runs_on_triton("embedding")):
            return None
        return _OnGpu(model, parts, _fuses_loss(model))
    if not embedding.is_cpu:
        return None
    fused_head = _fuses_loss(model)
    whole = packed_pass(model, with_head=not fused_head)
    return None if whole is None else _OnCpu(model, whole, fused_head)


class _OnCpu(NamedTuple):
    """Each text with the bits that it has alone."""

    model: Any
    whole: WholePass
    fused_head: bool  # whether the head's logits need not be held

    def packs(self, lengths: Sequence[int]) -> list[list[int]]:
        return packs(lengths) if self.fused_head else packs(lengths, _MOST_LOGITS)

    def losses(self, inputs: Sequence[list[int]], targets: list[int], last: list[int]) -> Tensor:
        """The loss of each target, which stands behind the input of the same place in `last`."""
        ids = torch.tensor(list(chain(*inputs)), dtype=torch.int64, device="cpu")
        labels = torch.tensor(targets, dtype=torch.int64, device="cpu")
        rows = self.whole.run_packed(ids, [PackedSequence(len(one)) for one in inputs])
        if len(last) < len(ids):
            rows = rows[torch.tensor(last, device="cpu")]
        if self.fused_head:
            ops.check_targets(labels, len(self.model.out_head.weight), -100)
            return _fused_losses(self.model, rows, labels)
        return _cross_entropy(rows, labels)


class _OnGpu(NamedTuple):
    """As alone but for how sums are rounded."""

    model: Any
    parts: Parts
    fused_head: bool

    def packs(self, lengths: Sequence[int]) -> list[list[int]]:
        """Of like lengths: attention has programs for the longest in each text's place."""
        found: list[list[int]] = []
        total = 0
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            total += lengths[i]
            if not found or total > _MOST_ON_GPU:
                found.append([])
                total = lengths[i]
            found[-1].append(i)
        return found

    def losses(self, inputs: Sequence[list[int]], targets: list[int], last: list[int]) -> Tensor:
        """The loss of each target, which stands behind the input of the same place in `last`."""
        parts = self.parts
        # Looked at here: on the GPU each look would wait for what was computed before.
        check_ids(torch.tensor(list(chain(*inputs)), device="cpu"), n_rows(parts.tok))
        ops.check_targets(torch.tensor(targets, device="cpu"), n_rows(parts.head.weight), -100)
        texts, (rows, labels) = packed(inputs, parts.pos.device, last, targets)
        h = features_of(parts, texts.ids, texts.position, texts.attention, rows)
        if self.fused_head:
            return _fused_losses(self.model, h, labels)
        some = zip(h.split(_MOST_LOGITS), labels.split(_MOST_LOGITS), strict=True)
        return torch.cat([_cross_entropy(logits_behind(parts, x), y) for x, y in some])


def _fused_losses(model: Any, rows: Tensor, targets: Tensor) -> Tensor:
    weight = model.out_head.weight
    return ops.checked_linear_cross_entropy(rows, weight, targets, -100, "none", owner=model)


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
    return F.cross_entropy(logits, targets.long(), reduction="none")


def _fuses_loss(model: GPTModel) -> bool:
    """Whether the head's logits need not be held."""
    head: Any = model.out_head
    return is_unmodified(head, nn.Linear) and "weight" in head._parameters and head.bias is None
