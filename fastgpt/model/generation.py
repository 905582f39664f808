"""Generation, token by token, through a key-value cache while the sequence fits the context."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import torch_state
from fastgpt.config import as_ids
from fastgpt.cpu.forward import WholePass
from fastgpt.model import decode_graph
from fastgpt.model.cache import KVCache, shorten
from fastgpt.model.fusable import KNOWN, drops_nothing, is_unmodified
from fastgpt.model.gpt import GPTModel
from fastgpt.model.modules import MultiHeadAttention
from fastgpt.model.prompt_lookup import PromptLookup
from fastgpt.model.sampling import Choose, likeliest, sampler

_LARGE = 1 << 23  # parameters of a model for which tokens are guessed


def generate_text_simple(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    prompt_lookup: bool = True,
) -> Tensor:
    """Greedy decoding: appends the likeliest next token, max_new_tokens times.

    Args:
        model: any module from ids [B, T] to logits [B, T, vocab_size]; its train or eval mode stays
            as it is.
        idx: [B, T] token ids, T at least 1.
        max_new_tokens: how many tokens to append.
        context_size: how many of the last tokens the model sees.
        prompt_lookup: whether, for one sequence on the CPU, tokens that followed the last ones
            where these stood before are guessed and checked, several a pass. The tokens are the
            same; where a text repeats itself they come sooner.

    Returns:
        [B, T + max_new_tokens] token ids, the same as by a full forward pass for each token.

    Raises:
        TypeError: the ids are not integers.
        ValueError: they are not [B, T] with T at least 1, or context_size is more than the model's
            context and the sequence outgrows it.
        IndexError: an id is outside the vocabulary.
    """
    idx = _start(idx)
    found = steps(model, idx, max_new_tokens, context_size, likeliest, prompt_lookup)
    return torch.cat((idx, *found), dim=1)


def generate(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    top_p: float | None = None,
    prompt_lookup: bool = True,
) -> Tensor:
    """Decoding with sampling, as in the book's chapter 5.

    Args:
        model: any module from ids [B, T] to logits [B, T, vocab_size].
        idx: [B, T] token ids, T at least 1.
        max_new_tokens: the most tokens to append.
        context_size: how many of the last tokens the model sees.
        temperature: 0 takes the likeliest token, as does whatever is below 1e-30; above that,
            logits are divided by it, in float32 at least, and a token is drawn from torch's
            generator: under one seed, that of ``torch.multinomial``, and so the book's.
        top_k: only the k likeliest tokens stay in the draw.
        eos_id: generation ends before this token; in a batch, once every row has come to it, and
            rows that end earlier are filled up with it.
        top_p: only the likeliest tokens that together reach this probability stay in the draw,
            after top_k and the temperature.
        prompt_lookup: as for ``generate_text_simple``. What is drawn is the same too.

    Returns:
        [B, T + n] token ids with n <= max_new_tokens.

    Raises:
        ValueError: as for ``generate_text_simple``, or temperature is negative or NaN, top_k below
            1 or top_p outside (0, 1].
        RuntimeError: a token is to be drawn on the CPU and a logit is NaN or infinite.
    """
    choose, idx = sampler(temperature, top_k, top_p), _start(idx)
    found = steps(model, idx, max_new_tokens, context_size, choose, prompt_lookup)
    return torch.cat((idx, *_until(eos_id, found)), dim=1)


def generate_stream(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    top_p: float | None = None,
    prompt_lookup: bool = True,
) -> Iterator[Tensor]:
    """``generate``, yielding each step's tokens [B, 1] as they come.

    Args, errors: those of ``generate``. The model may be changed between two steps, and stopping
    early leaves nothing behind. A change that PyTorch does not count, such as one through
    ``.data``, shows once the tokens that were guessed and checked before it are through, at most
    seven; without ``prompt_lookup`` at once.
    """
    choose, idx = sampler(temperature, top_k, top_p), _start(idx)
    found = steps(model, idx, max_new_tokens, context_size, choose, prompt_lookup, watched=True)
    return _until(eos_id, found)


def _start(idx: Tensor) -> Tensor:
    idx = as_ids(idx)
    if idx.shape[1] == 0:
        raise ValueError(
            f"token ids {tuple(idx.shape)} hold no token to go on from; <|endoftext|>, 50256 in "
            "GPT-2, starts a new text"
        )
    return idx


def _until(eos_id: int | None, tokens: Iterator[Tensor]) -> Iterator[Tensor]:
    ended: Tensor | None = None
    for new in tokens:
        if eos_id is not None:
            ended = new == eos_id if ended is None else ended | (new == eos_id)
            rows = ended.flatten().tolist()
            if all(rows):
                return
            if any(rows):
                new.masked_fill_(ended, eos_id)  # in place: the reader's changes reach the model
        yield new


def steps(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    choose: Choose,
    prompt_lookup: bool = True,
    watched: bool = False,
    generators: Sequence[torch.Generator] | None = None,
) -> Iterator[Tensor]:
    """Each step's tokens [B, 1], chosen from the last token's logits [B, vocab_size].

    Watched, code of the user's runs between the steps, and may change the model. Where a graph
    chooses too, the tokens are not waited for.
    """
    cache = new_cache(model) if context_size > 0 else None
    unseen, length = idx[:, -context_size:], idx.shape[1]
    texts = [idx]  # joined only for a pass that takes more than what is unseen
    whole: WholePass | None = None
    graphs = None if cache is None else _graphs(model, idx)
    guesses: _Guesses | None = None
    if cache is not None and prompt_lookup and idx.shape[0] == 1 and idx.is_cpu and _large(model):
        guesses = _Guesses(idx, cache)
    with contextlib.ExitStack() as stack:
        decoder: Any = None
        for done in range(max_new_tokens):
            last: Tensor | None = None
            with torch.no_grad():
                if guesses is not None and guesses.holds(model if watched else None):
                    last = guesses.logits()
                elif cache is None or not isinstance(model, GPTModel):
                    last = model(_joined(texts)[:, -context_size:])[:, -1]
                elif length > context_size:  # the window slides, and with it every position
                    window = _joined(texts)[:, -context_size:]
                    if whole is None or watched:
                        whole = model.whole_pass(window)
                    last = model.forward_pass(window, None, True, whole)[:, -1]
                elif decoder is not None and (not watched or decoder.serves(model)):
                    ids = model.checked(unseen, length - 1)
                    if generators is None:
                        unseen = decoder.next(ids)
                    else:
                        last = decoder.step(ids)[:, -1]
                else:
                    if decoder is not None:  # the model was changed: on without a graph
                        decoder.state.empty_into(cache)
                        decoder = None
                    if whole is None or watched:
                        whole = model.whole_pass(unseen)
                    left = min(max_new_tokens - done - 1, context_size - length)
                    if guesses is not None and whole is not None and whole.rows_alike > 1:
                        last = guesses.run(model, unseen, whole, left)
                    else:
                        last = model.forward_pass(unseen, cache, True, whole)[:, -1]
                    if graphs is not None:
                        in_graph = choose if generators is None else None
                        decoding = graphs.decoding(model, cache, left, in_graph)
                        decoder, graphs = stack.enter_context(decoding), None
                if last is not None:
                    unseen = choose(last, generators)
                if guesses is not None:
                    guesses.check(int(unseen))
            texts.append(unseen)
            length += 1
            yield unseen


def _joined(texts: list[Tensor]) -> Tensor:
    """The texts as one, which takes their place."""
    texts[:] = [torch.cat(texts, dim=1)]
    return texts[0]


class _Guesses:
    """The passes of one sequence on the CPU, with guessed tokens behind the last one.

    Each guess that turns out to be the next token has its logits already.
    """

    def __init__(self, idx: Tensor, cache: KVCache) -> None:
        self.lookup, self.cache = PromptLookup(idx[0].tolist()), cache
        self.guessed: list[int] = []
        self.rows: list[Tensor] = []  # logits [1, V] behind what is still to be checked
        self.good = 0
        self.versions: Any = None

    def run(self, model: GPTModel, unseen: Tensor, whole: WholePass, most: int) -> Tensor:
        """Logits [1, V] behind the tokens [1, T], with at most so many guesses in the same pass."""
        one = unseen.shape[1] == 1
        # Not past the context either, which the text may end before.
        most = min(most, whole.rows_alike - 1, whole.context - len(self.lookup.tokens))
        self.guessed = self.lookup.guess(most) if one else []
        since = time.perf_counter()
        if self.guessed:
            unseen = torch.cat((unseen, unseen.new_tensor([self.guessed])), dim=1)
        logits = model.forward_pass(unseen, self.cache, not self.guessed, whole)
        if one:
            self.lookup.passed(len(self.guessed), since)
        if not self.guessed:
            return logits[:, -1]
        self.good, self.versions = 0, _versions(model)
        self.rows = list(logits.unbind(1))
        return self.rows.pop(0)

    def holds(self, watched: Any) -> bool:
        """Whether the next logits are there already; not if a model that is watched has changed
        since.
        """
        if self.rows and watched is not None and not self._stands(watched):
            self._drop(1)
        return bool(self.rows)

    def logits(self) -> Tensor:
        """Those behind the last token."""
        return self.rows.pop(0)

    def check(self, token: int) -> None:
        """Takes note of the next token. The cache keeps what was guessed right."""
        if self.rows:
            if token == self.guessed[self.good]:
                self.good += 1
            else:
                self._drop(0)
        elif self.guessed:
            self.lookup.checked(self.good)
            self.guessed = []
        self.lookup.add(token)

    def _drop(self, last: int) -> None:
        """Forgets the guesses that are not confirmed, and so many that are."""
        self.lookup.checked(self.good)
        self.rows, self.guessed = [], []
        shorten(self.cache, len(self.lookup.tokens) - last)

    def _stands(self, model: GPTModel) -> bool:
        whole = model.whole_pass(torch.zeros(1, 1, dtype=torch.int64, device="cpu"))
        alike = whole is not None and whole.rows_alike > 1
        return alike and self.versions == _versions(model)


def _large(model: nn.Module) -> bool:
    """Whether a pass takes long enough that looking tokens up is nothing beside it."""
    return sum(t.numel() for t in (*model.parameters(), *model.buffers())) >= _LARGE


def _versions(model: GPTModel) -> list[tuple[int, int]]:
    """Where the model's tensors lie, and how often each was changed."""
    tensors = (*model.parameters(), *model.buffers())
    return [(t.data_ptr(), torch_state.version(t)) for t in tensors]


def _graphs(model: nn.Module, idx: Tensor) -> Any:
    """The module that decodes by CUDA graphs; None if it cannot on this device."""
    pos = getattr(model.pos_emb, "weight", None)
    if not isinstance(pos, Tensor) or pos.device != idx.device:
        return None
    return decode_graph if decode_graph.can_run(pos) else None


def new_cache(model: nn.Module) -> KVCache | None:
    """A cache, if tokens fed one by one certainly give what the whole sequence gives, else None.

    A foreign module might look at neighbouring tokens, a hook might count them, and dropout draws
    another mask for each call: all these take the book's loop.
    """
    if not isinstance(model, GPTModel) or not is_unmodified(model, GPTModel):
        return None
    for module in model.modules():
        if type(module) not in KNOWN or not is_unmodified(module, type(module)):
            return None
        if isinstance(module, nn.Dropout) and not drops_nothing(module):
            return None
        if isinstance(module, MultiHeadAttention) and not module.is_causal():
            return None
    return KVCache(len(model.trf_blocks)) if len(model.trf_blocks) > 0 else None
