"""Cached generation on a GPU as one CUDA graph a step, and a small one that chooses the next token.

The keys, the values and each row's position lie in memory of the graph's own, the parameters are
read where they live: a step sees what changed in them. A graph serves one model, number of rows and
set of addresses, and is captured again if a parameter moves in memory. A model keeps the one that
it used last, with keys and values for its whole context; ``reset_kv_cache`` and ``train`` give
them back.

Where Triton does not serve the GPU, the graph is of PyTorch's own operations. Their attention reads
all slots of the caches, so these have room for a text's tokens and no more than as many again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch
from fastgpt.config import check_ids
from fastgpt.cpu.records import n_rows
from fastgpt.model import fused_step
from fastgpt.model.cache import KVCache, idle
from fastgpt.model.gpt import GPTModel
from fastgpt.model.sampling import Choose
from fastgpt.model.token_pass import Attention, Parts, logits_of, packed, parts_of
from fastgpt.torch_state import forget_workspaces, version

# Fewer steps than these are not worth a capture.
MIN_STEPS = 8
# Slots past the last one, where PyTorch's operations put the tokens of a row that has come to its
# end; so many that the mask's rows stay aligned.
_SPARE = 16


class State:
    """The memory of one graph: of each row the step's token, its position and the caches.

    A row at position 0 holds no sequence: it takes part in a step, and nothing comes of it.
    """

    def __init__(self, parts: Parts, rows: int, tokens: int | None = None) -> None:
        pos, heads = parts.pos, parts.n_heads
        context, head_dim = pos.shape[0], pos.shape[1] // heads
        self.capacity, slots = context, context
        self.masked = dispatch.lacks_kernels(pos.device)  # what is read of the caches, not the rest
        if self.masked:
            self.capacity = min(context, 1 << ((tokens or context) - 1).bit_length())
            slots = self.capacity + _SPARE
        self.ids = torch.zeros(rows, dtype=torch.int64, device=pos.device)
        self.position = torch.zeros(rows, dtype=torch.int32, device=pos.device)
        self.rows = torch.arange(rows, dtype=torch.int32, device=pos.device)
        shape = (rows, heads, slots, head_dim)
        self.caches = [(pos.new_zeros(shape), pos.new_zeros(shape)) for _ in parts.blocks]

    def tensors(self) -> Iterator[Tensor]:
        """All of the memory."""
        return chain((self.ids, self.position, self.rows), *self.caches)

    def fill(self, cache: KVCache, first: int = 0) -> None:
        """Takes over what prompts of one length left in an ordinary cache, from that row on."""
        for caches, pair in zip(self.caches, cache.get_all(), strict=True):
            assert pair is not None
            rows, past = slice(first, first + pair[0].shape[0]), pair[0].shape[2]
            for own, given in zip(caches, pair, strict=True):
                own[rows, :, :past] = given
                if self.masked:  # a NaN of an earlier text would go through the mask
                    own[rows, :, past:] = 0
            self.position[rows] = past

    def empty_into(self, cache: KVCache) -> None:
        """Leaves all its tokens, as many in each row, to an ordinary cache."""
        past = int(self.position[0])
        for layer, (keys, values) in enumerate(self.caches):
            cache.update(layer, (keys[:, :, :past].clone(), values[:, :, :past].clone()))


def step(parts: Parts, state: State) -> Tensor:
    """Logits [rows, vocab_size] of the state's tokens, whose keys and values join the caches.

    Each row's position moves on. One that has come to the end of its room stays there: its token
    joins nothing and its logits mean nothing. So does one at 0.
    """
    if fused_step.takes(parts, len(state.ids)):
        return fused_step.logits_of(parts, state.ids, state.position, state.caches)
    length = (state.position + 1).clamp_(max=state.capacity)
    attention = (_torch_attention if state.masked else _kernels_attention)(state, length)
    logits = logits_of(parts, state.ids, state.position, attention)
    torch.mul(length, state.position.sign(), out=state.position)
    return logits


def _kernels_attention(state: State, length: Tensor) -> Attention:
    kernels = dispatch.module("triton", "decode_attention", length)

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        caches, scale, out = state.caches[layer], q.shape[2] ** -0.5, q.new_empty(q.shape)
        kernels.append(k, v, state.position, state.rows, *caches)
        kernels.decode_attention(q.unsqueeze(2), *caches, length, scale, out.unsqueeze(2))
        return out

    return attention


def _torch_attention(state: State, length: Tensor) -> Attention:
    keys, _ = state.caches[0]
    place = state.position.long().view(-1, 1, 1, 1)
    behind = torch.arange(keys.shape[2], device=keys.device) >= length.view(-1, 1, 1, 1)
    mask = torch.zeros_like(behind, dtype=keys.dtype).masked_fill_(behind, -torch.inf)

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(2) for t in (q, k, v))
        for cache, new in zip(state.caches[layer], (k, v), strict=True):
            cache.scatter_(2, place.expand(new.shape), new)
        caches = state.caches[layer]
        return F.scaled_dot_product_attention(q, *caches, attn_mask=mask).squeeze(2)

    return attention


def prefill(
    parts: Parts, state: State, prompts: Sequence[Sequence[int]], rows: Sequence[int]
) -> Tensor:
    """Logits [n, vocab_size] behind each prompt, whose keys and values fill its row of the state.

    The prompts go through the model one behind another, without padding.
    """
    lengths = [len(prompt) for prompt in prompts]
    row_of_each = list(chain(*map(repeat, rows, lengths)))
    texts, (row, filled, past) = packed(prompts, parts.pos.device, row_of_each, rows, lengths)
    kernels = dispatch.module("triton", "decode_attention", parts.pos)

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kernels.append(k, v, texts.position, row, *state.caches[layer])
        return texts.attention(layer, q, k, v)

    last = texts.bounds[1:] - 1
    logits = logits_of(parts, texts.ids, texts.position, attention, last)
    state.position[filled] = past
    return logits


def choose_next(state: State, logits: Tensor, choose: Choose) -> Tensor:
    """The tokens [rows] chosen from these logits, which become the state's."""
    return state.ids.copy_(choose(logits).flatten())


def current_stream(device: torch.device) -> Any:
    """The GPU's current stream; None for another device."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A function that repeats the run, and the tensor that holds its result each time.

    A repetition draws from PyTorch's generator what the run would draw; the capture draws nothing.
    """
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(current)
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        with torch.cuda.stream(side), torch.random.fork_rng([device]):
            if not dispatch.lacks_kernels(device):
                dispatch.module("triton", "compilation", None).compile_ahead(run)
            run()  # sets the libraries up
    finally:  # whoever frees what the run writes to does so on this stream
        current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # The outer one, because torch.cuda.graph stays on its stream where the capture fails; that one
    # named, because its own is of whichever GPU captured first. Another thread, say one that loads
    # data, may go on using the GPU meanwhile.
    recorded = torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local")
    # The graph has its libraries' scratch memory to itself: what others use they may also free.
    forget_workspaces()
    try:
        with torch.cuda.stream(current), recorded:
            result = run()
    finally:
        forget_workspaces()
    return graph.replay, result


class Decoder:
    """A captured step with its memory, of room for so many tokens in each row, by default the
    context.

    Raises:
        RuntimeError: the capture failed, for want of memory say.
    """

    def __init__(self, parts: Parts, rows: int, tokens: int | None = None) -> None:
        self.key = (rows, *parts.key())
        self._parts = parts
        # In inference mode the memory could only be written in inference mode ever after.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(parts.pos):
            self.state = State(parts, rows, tokens)
            self._replay, self._logits = capture(lambda: step(parts, self.state))
        self._stream = current_stream(parts.pos.device)
        self.chooses: Choose | None = None
        self._chosen: Tensor | None = None  # what `next` handed out, while it is the state's

    def follow(self) -> None:
        """Has the current stream wait for all that another one may still do with the memory."""
        stream = current_stream(self.state.ids.device)
        if stream is None or stream == self._stream:
            return
        stream.wait_stream(self._stream)
        for tensor in self.state.tensors():
            tensor.record_stream(stream)
        self._stream = stream

    def choose_by(self, choose: Choose) -> None:
        """Captures how ``next`` chooses, in a graph of its own: another choice leaves the model's
        step, which ``step`` runs alone, as it was captured.

        Raises:
            RuntimeError: as for a decoder.
        """
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(self.state.ids):
            self._choose, _ = capture(lambda: choose_next(self.state, self._logits, choose))
        self.chooses = choose

    def next(self, ids: Tensor) -> Tensor:
        """Each row's next token, [rows, 1] of ids [rows, 1], chosen on the GPU, which nobody waits
        for. Those that the last call gave need no copy to be the ids of this one.

        Raises:
            IndexError: somebody wrote an id into them that is outside the vocabulary.
        """
        changed = ids.is_inference() or version(ids) > 0  # which inference mode does not count
        if changed:  # a look-up past the table's end would end the process's use of the GPU
            check_ids(ids, n_rows(self._parts.tok))
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(self.state.ids):
            if changed or ids is not self._chosen:
                self.state.ids.copy_(ids.flatten())
            self._replay()
            self._choose()
            self._chosen = self.state.ids.clone().unsqueeze(1)
        return self._chosen

    def step(self, ids: Tensor) -> Tensor:
        """Logits of each row's next token, until the next step: [rows, vocab_size] of ids [rows],
        or [rows, 1, vocab_size] of ids [rows, 1].

        The ids of rows that hold no sequence must lie in the vocabulary too.
        """
        self.state.ids.copy_(ids.flatten())
        self._chosen = None
        with torch.cuda.device_of(self.state.ids):
            self._replay()
        return self._logits.view(*ids.shape, -1)

    def prefill(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """Logits [n, vocab_size] behind each of n prompts, which go on in the rows of these
        numbers, whatever these held.

        Raises:
            ValueError: a prompt is empty or longer than the context, or there is not one row of the
                decoder's for each.
            IndexError: an id is outside the vocabulary.
            dispatch.KernelError: a kernel does not run here; from then on no decoder is given out.
        """
        context, n = self._parts.pos.shape[0], len(self.state.ids)
        for length in map(len, prompts):
            if not 1 <= length <= context:
                raise ValueError(f"a prompt has {length} tokens, the model takes 1 to {context}")
        own = len(set(rows)) == len(rows) == len(prompts)
        if not own or not all(0 <= row < n for row in rows):
            raise ValueError(f"{len(prompts)} prompts need as many of the {n} rows, got {rows}")
        check_ids(torch.tensor(list(chain(*prompts)), device="cpu"), n_rows(self._parts.tok))
        if not prompts:
            return self._logits[:0]
        with torch.no_grad(), torch.cuda.device_of(self.state.ids):
            return prefill(self._parts, self.state, prompts, rows)

    def release(self, row: int) -> None:
        """Forgets the row's sequence, so that it takes no time in the steps to come."""
        self.state.position[row] = 0

    def serves(self, model: GPTModel) -> bool:
        """Whether a step of the model, as it is now, still is what was captured."""
        parts = parts_of(model)
        return (
            parts is not None
            and self.key == (len(self.state.ids), *parts.key())
            and can_run(parts.pos)
            and not dispatch.autocasts(parts.pos)
        )


def can_run(pos: Tensor) -> bool:
    """Whether a model with such a table of positions runs by graphs, as far as its device tells."""
    return dispatch.on_triton("decode_attention", pos) or dispatch.lacks_kernels(pos.device)


@contextlib.contextmanager
def decoding(
    model: GPTModel, cache: KVCache, steps: int, choose: Choose | None = None
) -> Iterator[Decoder | None]:
    """A decoder for at most so many steps behind the tokens of this cache, whose ``next`` chooses
    so.

    None if no graph can serve the model or be captured, or so few steps are not worth one.
    """
    pair = cache.get(0)
    rows, past = (0, 0) if pair is None else (pair[0].shape[0], pair[0].shape[2])
    with _lent(model, rows, steps, choose, past) as decoder:
        if decoder is not None:
            decoder.state.fill(cache)
        yield decoder


@contextlib.contextmanager
def row_decoding(model: GPTModel, rows: int, steps: int) -> Iterator[Decoder | None]:
    """A decoder of so many rows, which hold no sequence yet, for at most so many steps.

    None as for ``decoding``.
    """
    parts = parts_of(model)
    runs = parts is not None and parts.packs_on_triton()
    with _lent(model, rows if runs else 0, steps) as decoder:
        if decoder is not None:
            decoder.state.position.zero_()
        yield decoder


@contextlib.contextmanager
def _lent(
    model: GPTModel, rows: int, steps: int, choose: Choose | None = None, past: int = 0
) -> Iterator[Decoder | None]:
    """The model's decoder of so many rows, whatever they hold; None as for ``decoding``."""
    parts = parts_of(model)
    decoder = None
    if rows > 0 and parts is not None and _run_by_graphs(parts):
        decoder = _decoder(model, parts, rows, steps, choose, past)
    if decoder is None:
        yield None
        return
    try:
        yield decoder
    finally:
        idle[model] = decoder


def _run_by_graphs(parts: Parts) -> bool:
    return parts.runs_on_triton("embedding", "decode_attention") or parts.runs_on_torch()


def _decoder(
    model: GPTModel, parts: Parts, rows: int, steps: int, choose: Choose | None, past: int
) -> Decoder | None:
    kept: Decoder | None = idle.pop(model, None)
    tokens = min(past + steps, parts.pos.shape[0])
    decoder = None
    if kept is not None and kept.key == (rows, *parts.key()) and kept.state.capacity >= tokens:
        decoder = kept
        decoder.follow()
    if decoder is not None and choose in (None, decoder.chooses):
        return decoder
    if steps < MIN_STEPS:
        if kept is not None:
            idle[model] = kept
        return None
    del kept  # before the next one takes as much memory
    try:
        decoder = decoder or Decoder(parts, rows, tokens)
        if choose is not None:
            decoder.choose_by(choose)
    except RuntimeError as error:
        warnings.warn(
            f"fastgpt generates without a CUDA graph, whose capture failed: {error}",
            dispatch.BackendWarning,
            stacklevel=2,
        )
        return None
    return decoder
