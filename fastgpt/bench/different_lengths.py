"""How other libraries, and the book's reader, take many sequences of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PADDED = 8  # sequences of a padded batch
# That CTranslate2 continues at once: as fast as 32, or as a limit of 2048 tokens, and faster than 8
# or 16, or than calls of 8 or 32 prompts that run as long as the longest (32: by a third).
TOGETHER = 64
PAD = 0

Texts = Sequence[Tensor]  # ids, [tokens] each


def hugging_face_texts(hf: Any, prompts: Texts, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """The prompts continued greedily, each by its number of tokens, in batches that are padded on
    the left. A batch runs as long as its longest: prompts that want as many go together.
    """
    texts = dict[int, Tensor]()
    for batch in _batches(counts, PADDED):
        most = max(counts[i] for i in batch)
        ids = _padded([prompts[i] for i in batch], left=True)
        out = hf.generate(
            ids,
            attention_mask=(ids != PAD).long(),
            max_new_tokens=most,
            min_new_tokens=most,
            do_sample=False,
            pad_token_id=PAD,
        )
        for i, row in zip(batch, out[:, ids.shape[1] :], strict=True):
            texts[i] = torch.cat((prompts[i], row[: counts[i]]))
    return _in_order(texts)


def ctranslate2_texts(ct2: Any, prompts: Texts, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """The same in CTranslate2. The callback ends each prompt at its own number of tokens."""
    most, left = max(counts), list(counts)

    def is_last(step: Any) -> bool:
        left[step.batch_id] -= 1
        return left[step.batch_id] == 0

    results = ct2.generate_batch(
        [list(map(str, prompt.tolist())) for prompt in prompts],
        max_batch_size=TOGETHER,
        max_length=most,
        min_length=most,
        beam_size=1,
        include_prompt_in_result=False,
        callback=is_last,
    )
    return tuple(
        torch.cat((prompt, torch.tensor(result.sequences_ids[0])))
        for prompt, result in zip(prompts, results, strict=True)
    )


def padded_scores(logits_of: Callable[[Tensor], Tensor], texts: Texts) -> tuple[Tensor, ...]:
    """The log-probability of each token after a text's first, from the logits of batches that are
    padded on the right: texts of about the same length go together.
    """
    scores = dict[int, Tensor]()
    for batch in _batches(list(map(len, texts)), PADDED):
        ids = _padded([texts[i] for i in batch], left=False)
        logits, targets = logits_of(ids[:, :-1]), ids[:, 1:]
        found = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        for i, row in zip(batch, found.view_as(targets), strict=True):
            scores[i] = row[: len(texts[i]) - 1].clone()
    return _in_order(scores)


def ctranslate2_scores(ct2: Any, texts: Texts) -> tuple[Tensor, ...]:
    """The same by CTranslate2, which sorts and pads by itself."""
    words = [list(map(str, text.tolist())) for text in texts]
    results = ct2.score_batch(words, max_batch_size=PADDED)
    return tuple(torch.tensor(result.log_probs) for result in results)


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices sorted by length, so many at a time."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for first in range(0, len(order), size):
        yield order[first : first + size]


def _padded(texts: Texts, left: bool) -> Tensor:
    """[B, T], as wide as the longest."""
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(list(texts), True, PAD, side)


def _in_order(found: dict[int, Tensor]) -> tuple[Tensor, ...]:
    return tuple(found[i] for i in sorted(found))
