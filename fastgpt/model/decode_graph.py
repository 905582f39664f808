"""Cached generation on a GPU as one CUDA graph a step.

The keys, the values and the position lie in memory of the graph's own, the parameters are read
where they live: a step sees what changed in them. A graph serves one model, batch size and set of
addresses, and is captured again if a parameter moves in memory. A model keeps the one that
it used last, with keys and values for its whole context; ``reset_kv_cache`` gives them back.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import dispatch, ops
from fastgpt.cpu.records import Block, Dynamic, Linear, Norm, n_rows, shape_of
from fastgpt.model.cache import KVCache, idle
from fastgpt.model.gpt import GPTModel
from fastgpt.quantized_weight import dequantize
from fastgpt.triton import launch_table

# Fewer steps than these are not worth a capture.
MIN_STEPS = 8


class Parts(NamedTuple):
    """The parameters that a step reads, how many heads there are, and the norms' eps.

    Weights, and the tokens' table, may be quantised.
    """

    tok: Any
    pos: Tensor
    blocks: tuple[Block, ...]
    norm: Norm
    head: Linear
    n_heads: int
    eps: float

    def parameters(self) -> list[Any]:
        """Tensors and quantised weights."""
        every = (
            self.tok,
            self.pos,
            *self.norm,
            *self.head,
            *(t for b in self.blocks for t in b.flat()),
        )
        return [t for t in every if t is not None]

    def tensors(self) -> list[Tensor]:
        """The same, with the tensors that a quantised weight consists of."""
        return [t for one in self.parameters() for t in _tensors_of(one)]

    def key(self) -> tuple[Any, ...]:
        """What a graph of them depends on."""
        where = ((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in self.tensors())
        how = launch_table.precision(self.pos), torch.are_deterministic_algorithms_enabled()
        return self.n_heads, self.eps, how, *where


def _tensors_of(parameter: Any) -> tuple[Tensor, ...]:
    if isinstance(parameter, Dynamic):
        return parameter.weight
    return parameter if isinstance(parameter, tuple) else (parameter,)


def parts_of(model: GPTModel) -> Parts | None:
    """The model taken apart for steps; None if a piece of it is modified, drops something, or is of
    a shape that the kernels do not take.
    """
    record = model.record()
    if record is None or not record.blocks:
        return None
    (tok, pos), (norm, eps, head) = record.embeddings, record.end
    assert head is not None
    width, n_heads = pos.shape[1], record.blocks[0].n_heads
    for block in record.blocks:
        if block.attention_p or block.shortcut_p or (block.n_heads, block.eps) != (n_heads, eps):
            return None
        if not _fit(block.parameters, width):
            return None
    # An id that the head has and the table has not must be refused, which a graph cannot.
    if n_rows(head.weight) > n_rows(tok):
        return None
    if width // n_heads > launch_table.WIDEST["causal_attention"]:
        return None
    blocks = tuple(block.parameters for block in record.blocks)
    return Parts(tok, pos, blocks, norm, head, n_heads, eps)


def _fit(p: Block, width: int) -> bool:
    """Whether the parameters have the shapes of a block of this width."""
    hidden = n_rows(p.up.weight)
    return (
        all(t is not None and t.shape == (width,) for t in (*p.norm1, *p.norm2))
        and all(
            shape_of(layer.weight) == (width, width) for layer in (p.query, p.key, p.value, p.out)
        )
        and shape_of(p.up.weight) == (hidden, width)
        and shape_of(p.down.weight) == (width, hidden)
    )


class State:
    """The memory of one graph: the step's tokens, their position and the caches."""

    def __init__(self, parts: Parts, batch: int) -> None:
        pos, heads = parts.pos, parts.n_heads
        context, head_dim = pos.shape[0], pos.shape[1] // heads
        self.ids = torch.zeros((batch, 1), dtype=torch.int64, device=pos.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=pos.device)
        shape = (batch, heads, context, head_dim)
        self.caches = [(pos.new_zeros(shape), pos.new_zeros(shape)) for _ in parts.blocks]

    def fill(self, cache: KVCache) -> None:
        """Takes over what the prompt left in an ordinary cache."""
        for (keys, values), pair in zip(self.caches, cache.get_all(), strict=True):
            assert pair is not None
            past = pair[0].shape[2]
            keys[:, :, :past], values[:, :, :past] = pair
            self.position.fill_(past)

    def empty_into(self, cache: KVCache) -> None:
        """Leaves all its tokens to an ordinary cache."""
        past = int(self.position)
        for layer, (keys, values) in enumerate(self.caches):
            cache.update(layer, (keys[:, :, :past].clone(), values[:, :, :past].clone()))


def step(parts: Parts, state: State) -> Tensor:
    """Logits [B, 1, vocab_size] of the state's tokens, whose keys and values join the caches. The
    position moves on.
    """
    length = (state.position + 1).to(torch.int32)
    x = _embedded(parts, state)
    branch: Tensor | None = None
    for p, (keys, values) in zip(parts.blocks, state.caches, strict=True):
        if branch is None:
            h = ops.layer_norm(x, *p.norm1, parts.eps)
        else:
            h, x = ops.add_layer_norm(x, branch, *p.norm1, parts.eps)
        context = _attended(p, h, keys, values, state.position, length)
        attended = _product(p.out, context)
        h, x = ops.add_layer_norm(x, attended, *p.norm2, parts.eps)
        fused = p.up.bias is not None and isinstance(p.up.weight, Tensor)
        h = ops.linear_gelu(h, *p.up) if fused else ops.gelu(_product(p.up, h))
        branch = _product(p.down, h)
    assert branch is not None
    h, _ = ops.add_layer_norm(x, branch, *parts.norm, parts.eps)
    state.position += 1
    return _product(parts.head, h)


def _embedded(parts: Parts, state: State) -> Tensor:
    """The blocks' input, [B, 1, D]."""
    tok, pos, ids = parts.tok, parts.pos, state.ids
    if not isinstance(tok, Tensor):
        rows = type(tok)(*(t[ids] for t in tok))
        return dequantize(rows, pos.dtype) + pos[state.position]
    x = pos.new_empty(*ids.shape, pos.shape[1])
    embed = dispatch.module("triton", "embedding", tok).embedding
    embed(ids, tok.contiguous(), pos.contiguous(), state.position, x)
    return x


def _product(layer: Linear, x: Tensor) -> Tensor:
    weight, bias = layer
    if isinstance(weight, Tensor):
        return ops.linear(x, weight, bias)
    if isinstance(weight, Dynamic):
        return ops.quantized_linear(x, weight.weight, bias, dynamic=True)
    return ops.quantized_linear(x, weight, bias)


def _attended(
    p: Block, h: Tensor, keys: Tensor, values: Tensor, position: Tensor, length: Tensor
) -> Tensor:
    """What the attention hands to its output projection, [B, 1, D]."""
    B, H, _, head_dim = keys.shape
    layers = (p.query, p.key, p.value)
    projected = None
    if all(isinstance(layer.weight, Tensor) for layer in layers):
        projected = ops.packed_linear(h, *zip(*layers, strict=True))
    if projected is None:
        projected = tuple(_product(layer, h) for layer in layers)
    q, k, v = (t.unflatten(-1, (H, head_dim)).transpose(1, 2) for t in projected)
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    out = h.new_empty(B, 1, H, head_dim)
    kernels = dispatch.module("triton", "decode_attention", h)
    kernels.decode_attention(q, keys, values, length, head_dim**-0.5, out.transpose(1, 2))
    return out.flatten(2)


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A function that repeats the run, and the tensor that holds its result each time."""
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # compiles the kernels and sets the libraries up
        run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # The outer one, because torch.cuda.graph stays on its stream where the capture fails; that one
    # named, because its own is of whichever GPU captured first. Another thread, say one that loads
    # data, may go on using the GPU meanwhile.
    recorded = torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local")
    with torch.cuda.stream(current), recorded:
        result = run()
    return graph.replay, result


class Decoder:
    """A captured step with its memory.

    Raises:
        RuntimeError: the capture failed, for want of memory say.
    """

    def __init__(self, parts: Parts, batch: int) -> None:
        self.key = (batch, *parts.key())
        # In inference mode the memory could only be written in inference mode ever after.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(parts.pos):
            self.state = State(parts, batch)
            self._replay, self._logits = capture(lambda: step(parts, self.state))

    def step(self, ids: Tensor) -> Tensor:
        """Logits [B, 1, vocab_size] of the next tokens [B, 1], until the next step."""
        self.state.ids.copy_(ids)
        with torch.cuda.device_of(self.state.ids):
            self._replay()
        return self._logits

    def serves(self, model: GPTModel) -> bool:
        """Whether a step of the model, as it is now, still is what was captured."""
        parts = parts_of(model)
        return (
            parts is not None
            and self.key == (self.state.ids.shape[0], *parts.key())
            and dispatch.on_triton("decode_attention", parts.pos)
            and not dispatch.autocasts(parts.pos)
        )


@contextlib.contextmanager
def decoding(model: GPTModel, cache: KVCache, steps: int) -> Iterator[Decoder | None]:
    """A decoder for at most so many steps behind the tokens of this cache.

    None if no graph can serve the model or be captured, or so few steps are not worth one.
    """
    pair = cache.get(0)
    batch = 0 if pair is None else pair[0].shape[0]
    parts = parts_of(model)
    decoder = None
    if (
        batch > 0
        and parts is not None
        and not dispatch.autocasts(parts.pos)
        and dispatch.direct(parts.tensors())
        and dispatch.choose("layer_norm", *filter(torch.is_tensor, parts.parameters())) == "triton"
        and all(dispatch.on_triton(op, parts.pos) for op in ("embedding", "decode_attention"))
    ):
        decoder = _decoder(model, parts, batch, steps)
    if decoder is None:
        yield None
        return
    decoder.state.fill(cache)
    try:
        yield decoder
    finally:
        idle[model] = decoder


def _decoder(model: GPTModel, parts: Parts, batch: int, steps: int) -> Decoder | None:
    decoder = idle.pop(model, None)
    if decoder is not None and decoder.key == (batch, *parts.key()):
        return decoder
    if steps < MIN_STEPS:
        if decoder is not None:
            idle[model] = decoder
        return None
    del decoder  # before the next one takes as much memory
    try:
        return Decoder(parts, batch)
    except RuntimeError as error:
        warnings.warn(
            f"fastgpt generates without a CUDA graph, whose capture failed: {error}",
            dispatch.BackendWarning,
            stacklevel=2,
        )
        return None
