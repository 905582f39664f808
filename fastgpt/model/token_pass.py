"""A model taken apart for passes on a GPU over tokens that each have a position of their own, from
the parameters as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch, ops
from fastgpt.cpu.records import Block, Dynamic, Linear, Norm, n_rows, shape_of
from fastgpt.model.gpt import GPTModel
from fastgpt.quantized_weight import dequantize
from fastgpt.triton import launch_table


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

    def first_head(self) -> Tensor:
        """The first head's part of the positions' table."""
        return self.pos.detach()[:, : self.pos.shape[1] // self.n_heads]

    def runs_on_triton(self, *operations: str) -> bool:
        """Whether these operations, and the norms, run on the Triton backend."""
        return (
            all(dispatch.on_triton(op, self.pos) for op in operations)
            and not dispatch.autocasts(self.pos)
            and dispatch.direct(self.tensors())
            and dispatch.choose("layer_norm", *filter(torch.is_tensor, self.parameters()))
            == "triton"
        )

    def runs_on_torch(self) -> bool:
        """Whether all of it runs on PyTorch's own operations, for want of kernels for the GPU."""
        return (
            dispatch.lacks_kernels(self.pos.device)
            and not dispatch.autocasts(self.pos)
            and dispatch.direct(self.tensors())
        )

    def packs_on_triton(self) -> bool:
        """Whether attention there takes texts one behind another."""
        return dispatch.on_triton("causal_attention", self.first_head())

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


class Packed(NamedTuple):
    """Texts that stand one behind another, without padding, on the device of their pass."""

    ids: Tensor  # [N] int32
    position: Tensor  # [N] int32, of each token in its text
    bounds: Tensor  # [n + 1] int32, where each text begins and the last ends
    longest: int

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In every layer: what each text's attention hands to the output projection, [N, H, D]."""
        scale, out = q.shape[2] ** -0.5, q.new_empty(q.shape)
        *qkv, into = (t.transpose(0, 1)[None] for t in (q, k, v, out))
        kernels = dispatch.module("triton", "causal_attention", q)
        kernels.causal_attention(*qkv, scale, into, packed=(self.bounds, self.longest))
        return out


def packed(
    texts: Sequence[Sequence[int]], device: torch.device, *more: Sequence[int]
) -> tuple[Packed, list[Tensor]]:
    """Texts for one pass, and more numbers, [len] int32 each, all in one copy to the device."""
    lengths = [len(text) for text in texts]
    numbers = (
        list(chain(*texts)),
        list(chain(*map(range, lengths))),
        list(accumulate(lengths, initial=0)),
        *more,
    )
    joined = torch.tensor(list(chain(*numbers)), dtype=torch.int32, device=device)
    ids, position, bounds, *rest = joined.split([len(one) for one in numbers])
    return Packed(ids, position, bounds, max(lengths)), rest


# From a layer's number and its queries, keys and values, [N, H, D] each, to what its attention
# hands to the output projection, [N, H, D].
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def logits_of(
    parts: Parts, ids: Tensor, position: Tensor, attention: Attention, last: Tensor | None = None
) -> Tensor:
    """Logits [N, vocab_size] of the tokens ids [N], each at its position [N]; of those alone whose
    numbers are in last, if given. What stands past the context gets logits without meaning.
    """
    return logits_behind(parts, features_of(parts, ids, position, attention, last))


def logits_behind(parts: Parts, features: Tensor) -> Tensor:
    """The head's logits [N, vocab_size] of what it gets, [N, D]."""
    return _product(parts.head, features)


def features_of(
    parts: Parts, ids: Tensor, position: Tensor, attention: Attention, last: Tensor | None = None
) -> Tensor:
    """What the head gets, [N, D], for the logits of ``logits_of``."""
    x = _embedded(parts, ids, position)
    branch: Tensor | None = None
    for layer, p in enumerate(parts.blocks):
        if branch is None:
            h = ops.layer_norm(x, *p.norm1, parts.eps)
        else:
            h, x = ops.add_layer_norm(x, branch, *p.norm1, parts.eps)
        qkv = (t.unflatten(1, (parts.n_heads, -1)) for t in _projected(p, h))
        attended = _product(p.out, attention(layer, *qkv).flatten(1))
        h, x = ops.add_layer_norm(x, attended, *p.norm2, parts.eps)
        fused = p.up.bias is not None and isinstance(p.up.weight, Tensor)
        h = ops.linear_gelu(h, *p.up) if fused else ops.gelu(_product(p.up, h))
        branch = _product(p.down, h)
    assert branch is not None
    if last is not None:
        x, branch = x[last], branch[last]
    return ops.add_layer_norm(x, branch, *parts.norm, parts.eps)[0]


def _embedded(parts: Parts, ids: Tensor, position: Tensor) -> Tensor:
    """The blocks' input, [N, D]."""
    tok, pos = parts.tok, parts.pos
    if isinstance(tok, Tensor) and not dispatch.lacks_kernels(pos.device):
        x = pos.new_empty(len(ids), pos.shape[1])
        embed = dispatch.module("triton", "embedding", tok).embedding
        embed(ids.unsqueeze(1), tok.contiguous(), pos.contiguous(), position, x)
        return x
    if isinstance(tok, Tensor):
        of_ids = F.embedding(ids, tok)
    else:
        of_ids = dequantize(type(tok)(*(t[ids] for t in tok)), pos.dtype)
    # An index past the table's end would end the process's use of the GPU.
    return of_ids + F.embedding(position.clamp(max=pos.shape[0] - 1), pos)


def _projected(p: Block, h: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, [N, D] each."""
    layers = (p.query, p.key, p.value)
    if all(isinstance(layer.weight, Tensor) for layer in layers):
        packed = ops.packed_linear(h, *zip(*layers, strict=True))
        if packed is not None:
            return packed
    return tuple(_product(layer, h) for layer in layers)


def _product(layer: Linear, x: Tensor) -> Tensor:
    weight, bias = layer
    if isinstance(weight, Tensor):
        return ops.linear(x, weight, bias)
    if isinstance(weight, Dynamic):
        return ops.quantized_linear(x, weight.weight, bias, dynamic=True)
    return ops.quantized_linear(x, weight, bias)
