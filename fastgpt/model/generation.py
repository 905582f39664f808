"""Generation, token by token, through a key-value cache while the sequence fits the context."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import dispatch
from fastgpt.config import as_ids
from fastgpt.cpu.forward import WholePass
from fastgpt.model import decode_graph
from fastgpt.model.cache import KVCache
from fastgpt.model.fusable import KNOWN, drops_nothing, is_unmodified
from fastgpt.model.gpt import GPTModel
from fastgpt.model.modules import MultiHeadAttention

# Divided by less, two logits that differ are never both drawn, and large ones overflow.
GREEDY_BELOW = 1e-30


def generate_text_simple(
    model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int
) -> Tensor:
    """Greedy decoding: appends the likeliest next token, max_new_tokens times.

    Args:
        model: any module from ids [B, T] to logits [B, T, vocab_size]; its train or eval mode stays
            as it is.
        idx: [B, T] token ids, T at least 1.
        max_new_tokens: how many tokens to append.
        context_size: how many of the last tokens the model sees.

    Returns:
        [B, T + max_new_tokens] token ids, the same as by a full forward pass for each token.

    Raises:
        TypeError: the ids are not integers.
        ValueError: they are not [B, T] with T at least 1, or context_size is more than the model's
            context and the sequence outgrows it.
        IndexError: an id is outside the vocabulary.
    """
    idx = _start(idx)
    for new in _steps(model, idx, max_new_tokens, context_size, _likeliest):
        idx = torch.cat((idx, new), dim=1)
    return idx


def generate(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    top_p: float | None = None,
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

    Returns:
        [B, T + n] token ids with n <= max_new_tokens.

    Raises:
        ValueError: as for ``generate_text_simple``, or temperature is negative or NaN, top_k below
            1 or top_p outside (0, 1].
        RuntimeError: a token is to be drawn on the CPU and a logit is NaN or infinite.
    """
    choose, idx = _sampling(temperature, top_k, top_p), _start(idx)
    steps = _steps(model, idx, max_new_tokens, context_size, choose)
    for new in _until(eos_id, steps):
        idx = torch.cat((idx, new), dim=1)
    return idx


def generate_stream(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    top_p: float | None = None,
) -> Iterator[Tensor]:
    """``generate``, yielding each step's tokens [B, 1] as they come.

    Args, errors: those of ``generate``. The model may be changed between two steps, and stopping
    early leaves nothing behind.
    """
    choose, idx = _sampling(temperature, top_k, top_p), _start(idx)
    steps = _steps(model, idx, max_new_tokens, context_size, choose, watched=True)
    return _until(eos_id, steps)


def _start(idx: Tensor) -> Tensor:
    idx = as_ids(idx)
    if idx.shape[1] == 0:
        raise ValueError(
            f"token ids {tuple(idx.shape)} hold no token to go on from; <|endoftext|>, 50256 in "
            "GPT-2, starts a new text"
        )
    return idx


def _sampling(
    temperature: float, top_k: int | None, top_p: float | None
) -> Callable[[Tensor], Tensor]:
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature} is not 0 or above")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} is below 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is not above 0 and at most 1")

    def choose(logits: Tensor) -> Tensor:
        if temperature < GREEDY_BELOW:
            return _likeliest(logits)
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        if top_k is not None:
            least = torch.topk(logits, min(top_k, logits.shape[-1])).values[:, -1:]
            scaled.masked_fill_(logits < least, -torch.inf)
        probabilities = torch.softmax(scaled, dim=-1)
        if top_p is not None:
            probabilities = _likeliest_that_reach(top_p, probabilities)
        return _drawn(probabilities)

    return choose


def _drawn(probabilities: Tensor) -> Tensor:
    """[B, V] -> one token of each row, [B, 1], the one that ``torch.multinomial`` draws.

    It computes the same, after checks that are most of its kernels. One NaN makes a row of softmax
    NaN, so the first column tells; on a GPU it would have to be waited for.
    """
    if probabilities.device.type == "cpu" and probabilities[:, :1].isnan().any():
        raise RuntimeError("no token can be drawn: a logit of the model is NaN or infinite")
    waiting = torch.empty_like(probabilities).exponential_()
    return _likeliest(torch.div(probabilities, waiting, out=waiting))


def _likeliest_that_reach(top_p: float, probabilities: Tensor) -> Tensor:
    """[B, V] -> the same with the tokens behind the first that reach top_p at 0."""
    values, order = probabilities.sort(dim=-1, descending=True)
    behind = values.cumsum(dim=-1) - values >= top_p
    behind[:, 0] = False  # even where top_p is 0 in their dtype
    return probabilities.masked_fill(behind.scatter(-1, order, behind), 0)


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1, keepdim=True)


def _until(eos_id: int | None, tokens: Iterator[Tensor]) -> Iterator[Tensor]:
    ended: Tensor | None = None
    for new in tokens:
        if eos_id is not None:
            ended = new == eos_id if ended is None else ended | (new == eos_id)
            if ended.all():
                return
            new.masked_fill_(ended, eos_id)
        yield new


def _steps(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    choose: Callable[[Tensor], Tensor],
    watched: bool = False,
) -> Iterator[Tensor]:
    """Each step's tokens [B, 1], chosen from the last token's logits [B, vocab_size].

    Watched, code of the user's runs between the steps, and may change the model.
    """
    cache = _new_cache(model) if context_size > 0 else None
    unseen = idx[:, -context_size:]
    whole: WholePass | None = None
    graphs = None if cache is None else _graphs(model, idx)
    with contextlib.ExitStack() as stack:
        decoder: Any = None
        for done in range(max_new_tokens):
            with torch.no_grad():
                if cache is None or not isinstance(model, GPTModel):
                    logits = model(idx[:, -context_size:])
                elif idx.shape[1] > context_size:  # the window slides, and with it every position
                    if whole is None or watched:
                        whole = model.whole_pass(idx)
                    logits = model.forward_pass(idx[:, -context_size:], None, True, whole)
                elif decoder is not None and (not watched or decoder.serves(model)):
                    logits = decoder.step(model.checked(unseen, idx.shape[1] - 1))
                else:
                    if decoder is not None:  # the model was changed: on without a graph
                        decoder.state.empty_into(cache)
                        decoder = None
                    if whole is None or watched:
                        whole = model.whole_pass(unseen)
                    logits = model.forward_pass(unseen, cache, True, whole)
                    if graphs is not None:
                        left = min(max_new_tokens - done - 1, context_size - idx.shape[1])
                        decoder = stack.enter_context(graphs.decoding(model, cache, left))
                        graphs = None
                unseen = choose(logits[:, -1])
            idx = torch.cat((idx, unseen), dim=1)
            yield unseen


def _graphs(model: nn.Module, idx: Tensor) -> Any:
    """The module that decodes by CUDA graphs; None if the Triton backend does not run."""
    pos = getattr(model.pos_emb, "weight", None)
    if not isinstance(pos, Tensor) or pos.device != idx.device:
        return None
    if not dispatch.on_triton("decode_attention", pos):
        return None
    return decode_graph


def _new_cache(model: nn.Module) -> KVCache | None:
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
