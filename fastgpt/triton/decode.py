"""Cached generation on a GPU as one CUDA graph a step.

The keys, the values and the position lie in memory of the graph's own, the parameters are read
where they live: a step sees what changed in them. A graph serves one model, batch size and set of
addresses, and is made anew where a parameter has come to lie elsewhere.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import dispatch, ops
from fastgpt.cpu.transformer_block import EPS, BlockParameters
from fastgpt.kv_cache import KVCache
from fastgpt.model import GPTModel
from fastgpt.modules import LayerNorm
from fastgpt.plain import plain, plain_linear
from fastgpt.stack import taken_apart
from fastgpt.triton import settings

# Fewer steps than these are not worth a capture.
MIN_STEPS = 8


class Parts(NamedTuple):
    """The parameters that a step reads, and how many heads there are."""

    tok: Tensor
    pos: Tensor
    blocks: tuple[BlockParameters, ...]
    scale: Tensor
    shift: Tensor
    head: Tensor
    head_bias: Tensor | None
    n_heads: int

    def tensors(self) -> list[Tensor]:
        every = (self.tok, self.pos, self.scale, self.shift, self.head, self.head_bias)
        return [t for part in (every, *self.blocks) for t in part if t is not None]

    def key(self) -> tuple[Any, ...]:
        """What a graph of them depends on."""
        where = ((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in self.tensors())
        return self.n_heads, *where


def parts_of(model: GPTModel, batch: int) -> Parts | None:
    """The model taken apart for steps over so many sequences; None where it has a piece that is not
    plainly ours, or tensors that the kernels do not take.
    """
    head: Any = model.out_head
    norm: Any = model.final_norm
    found = [taken_apart(block) for block in model.trf_blocks]
    tables = (model.tok_emb, model.pos_emb)
    if (
        batch == 0
        or not found
        or not plain_linear(head)
        or not (plain(norm, LayerNorm) and norm.eps == EPS)
        or not all(plain(table, nn.Embedding) and table.max_norm is None for table in tables)
    ):
        return None
    tok, pos = (table.weight for table in tables)
    blocks, n_heads = [], 0
    for b in found:
        if b is None or b.attention_p or b.shortcut_p or n_heads not in (0, b.heads):
            return None
        if not _fit(b.parameters, tok.shape[1]):
            return None
        n_heads = b.heads
        blocks.append(b.parameters)
    width = tok.shape[1]
    if width // n_heads > settings.WIDEST["causal_attention"]:
        return None
    parts = Parts(tok, pos, tuple(blocks), norm.scale, norm.shift, head.weight, head.bias, n_heads)
    if dispatch.autocasts(tok) or dispatch.choose("layer_norm", *parts.tensors()) != "triton":
        return None
    return parts


def _fit(p: BlockParameters, width: int) -> bool:
    """Whether the parameters have the shapes of a block of this width."""
    norms = (p.scale1, p.shift1, p.scale2, p.shift2)
    inner = (p.query_weight, p.key_weight, p.value_weight, p.out_weight)
    hidden = p.up_weight.shape[0]
    return (
        all(t is not None and t.shape == (width,) for t in norms)
        and all(t.shape == (width, width) for t in inner)
        and p.up_weight.shape == (hidden, width)
        and p.down_weight.shape == (width, hidden)
    )


class State:
    """The memory of one graph: the step's tokens, their position and the caches."""

    def __init__(self, parts: Parts, batch: int) -> None:
        tok, context = parts.tok, parts.pos.shape[0]
        heads, head_dim = parts.n_heads, tok.shape[1] // parts.n_heads
        self.ids = torch.zeros((batch, 1), dtype=torch.int64, device=tok.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=tok.device)
        shape = (batch, heads, context, head_dim)
        self.caches = [(tok.new_zeros(shape), tok.new_zeros(shape)) for _ in parts.blocks]

    def fill(self, cache: KVCache) -> None:
        """Takes over what the prompt left in an ordinary cache."""
        for (keys, values), pair in zip(self.caches, cache.get_all(), strict=True):
            assert pair is not None
            past = pair[0].shape[2]
            keys[:, :, :past], values[:, :, :past] = pair
            self.position.fill_(past)


def step(parts: Parts, state: State) -> Tensor:
    """Logits [B, 1, vocab_size] of the state's tokens, whose keys and values join the caches. The
    position moves on.
    """
    tok, pos = parts.tok, parts.pos
    length = (state.position + 1).to(torch.int32)
    x = tok.new_empty(*state.ids.shape, tok.shape[1])
    embed = dispatch.module("triton", "embedding", tok).embedding
    embed(state.ids, tok.contiguous(), pos.contiguous(), state.position, x)
    branch: Tensor | None = None
    for p, (keys, values) in zip(parts.blocks, state.caches, strict=True):
        if branch is None:
            h = ops.layer_norm(x, p.scale1, p.shift1, EPS)
        else:
            h, x = ops.add_layer_norm(x, branch, p.scale1, p.shift1, EPS)
        context = _attended(p, h, keys, values, state.position, length)
        attended = ops.linear(context, p.out_weight, p.out_bias)
        h, x = ops.add_layer_norm(x, attended, p.scale2, p.shift2, EPS)
        if p.up_bias is None:
            h = ops.gelu(ops.linear(h, p.up_weight))
        else:
            h = ops.linear_gelu(h, p.up_weight, p.up_bias)
        branch = ops.linear(h, p.down_weight, p.down_bias)
    assert branch is not None
    h, _ = ops.add_layer_norm(x, branch, parts.scale, parts.shift, EPS)
    state.position += 1
    return ops.linear(h, parts.head, parts.head_bias)


def _attended(
    p: BlockParameters, h: Tensor, keys: Tensor, values: Tensor, position: Tensor, length: Tensor
) -> Tensor:
    """What the attention hands to its output projection, [B, 1, D]."""
    B, H, _, head_dim = keys.shape
    weights, biases = p[2:8:2], p[3:8:2]
    projected = ops.packed_linear(h, weights, biases)
    if projected is None:
        projected = tuple(ops.linear(h, w, b) for w, b in zip(weights, biases, strict=True))
    q, k, v = (t.unflatten(-1, (H, head_dim)).transpose(1, 2) for t in projected)
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    out = h.new_empty(B, 1, H, head_dim)
    kernels = dispatch.module("triton", "decode_attention", h)
    kernels.decode_attention(q, keys, values, length, head_dim**-0.5, out.transpose(1, 2))
    return out.flatten(2)


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What repeats the run, and where each time its result lies."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels and sets the libraries up
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Another thread, say one that loads data, may go on using the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result


class Decoder:
    """A captured step with its memory."""

    def __init__(self, parts: Parts, batch: int) -> None:
        self.key = parts.key()
        self.state = State(parts, batch)
        with torch.cuda.device_of(parts.tok):
            self._replay, self._logits = capture(lambda: step(parts, self.state))

    def step(self, ids: Tensor) -> Tensor:
        """Logits [B, 1, vocab_size] of the next tokens [B, 1], until the next step."""
        self.state.ids.copy_(ids)
        with torch.cuda.device_of(self.state.ids):
            self._replay()
        return self._logits


# Decoders that nobody is using, by model and batch size.
_idle: weakref.WeakKeyDictionary[GPTModel, dict[int, list[Decoder]]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def stepping(
    model: GPTModel, cache: KVCache, steps: int
) -> Iterator[Callable[[Tensor], Tensor] | None]:
    """For at most so many steps behind the tokens of this cache: a function from the next tokens
    [B, 1] to their logits [B, 1, vocab_size], which lie there until the next step.

    None where no graph can serve the model, or so few steps are not worth one.
    """
    pair = cache.get(0)
    batch = 0 if pair is None else pair[0].shape[0]
    parts = parts_of(model, batch)
    decoder = None if parts is None else _decoder(model, parts, batch, steps)
    if decoder is None:
        yield None
        return
    decoder.state.fill(cache)
    try:
        yield decoder.step
    finally:
        _idle[model][batch].append(decoder)


def _decoder(model: GPTModel, parts: Parts, batch: int, steps: int) -> Decoder | None:
    idle = _idle.setdefault(model, {}).setdefault(batch, [])
    key = parts.key()
    while idle:
        decoder = idle.pop()
        if decoder.key == key:
            return decoder
    return Decoder(parts, batch) if steps >= MIN_STEPS else None
