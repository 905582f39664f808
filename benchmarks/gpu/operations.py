"""Each operation by fastgpt's launchers, by its definition, and by its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt.quantized_weight import RUN, dequantize, quantize_weight
from fastgpt.triton.causal_attention import (
    causal_attention,
    causal_attention_backward,
    decode_attention,
)
from fastgpt.triton.cross_entropy import cross_entropy, cross_entropy_backward
from fastgpt.triton.embedding import embedding, embedding_backward
from fastgpt.triton.gelu import bias_gelu, bias_gelu_backward
from fastgpt.triton.layer_norm import layer_norm, layer_norm_backward
from fastgpt.triton.linear import linear
from fastgpt.triton.linear_cross_entropy import linear_cross_entropy
from fastgpt.triton.quantized_linear import quantized_linear

EPS, IGNORED, SEED = 1e-5, -100, 123

Tensors = tuple[Tensor, ...]
Function = Callable[..., "Tensor | Tensors"]


class Scale(NamedTuple):
    batch: int
    tokens: int
    heads: int
    head_dim: int
    vocabulary: int

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


FULL = Scale(64, 1024, 12, 64, 50257)  # GPT-2 124M's training step
REAL = Scale(2, 1024, 12, 64, 50257)
RAGGED = Scale(3, 131, 5, 40, 1003)
TINY = Scale(1, 9, 1, 16, 33)


@dataclass
class Work:
    """One operation on ready inputs. `definition(*inputs)` is differentiable, in any dtype."""

    inputs: Tensors
    upstream: Tensors
    definition: Function
    forward: Callable[[], Tensors]
    backward: Callable[[], Tensors] | None = None  # in the order of the inputs
    peers: dict[str, Function] = field(default_factory=dict)
    moved: tuple[float, float] = (0.0, 0.0)  # bytes: forward, backward
    operations: tuple[float, float] = (0.0, 0.0)
    whole: bool = False  # backward() does forward's work too; only both together are timed


def _bytes(*tensors: Tensor) -> float:
    return sum(t.numel() * t.element_size() for t in tensors)


def _liger(name: str, call: Callable[..., Function]) -> dict[str, Function]:
    """Liger's function as a peer, if Liger is installed; `call` makes the peer of it."""
    if find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers import functional

    return {"Liger": call(getattr(functional, name))}


def _layer_norm(s: Scale, new: partial[Tensor]) -> Work:
    x, dy, weight, bias = new(s.rows, s.width), new(s.rows, s.width), new(s.width), new(s.width)
    y, dx, dweight, dbias = (torch.empty_like(t) for t in (x, x, weight, bias))
    mean, rstd = (torch.empty(s.rows, device=x.device) for _ in range(2))

    def forward() -> Tensors:
        layer_norm(x, weight, bias, EPS, y, mean, rstd)
        return (y,)

    def backward() -> Tensors:
        layer_norm_backward(dy, x, weight, mean, rstd, dx, dweight, dbias)
        return dx, dweight, dbias

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)

    liger = _liger("liger_layer_norm", lambda f: lambda x, w, b: f(x, w, b, EPS))
    peers = {"F.layer_norm": definition, **liger}
    moved = (_bytes(x, y), _bytes(dy, x, dx))
    return Work((x, weight, bias), (dy,), definition, forward, backward, peers, moved)


def _add_layer_norm(s: Scale, new: partial[Tensor]) -> Work:
    x, branch, dy, dtotal = (new(s.rows, s.width) for _ in range(4))
    weight, bias = new(s.width), new(s.width)
    y, total, dx, dweight, dbias = (torch.empty_like(t) for t in (x, x, x, weight, bias))
    mean, rstd = (torch.empty(s.rows, device=x.device) for _ in range(2))

    def forward() -> Tensors:
        layer_norm(x, weight, bias, EPS, y, mean, rstd, branch, total)
        return y, total

    def backward() -> Tensors:
        layer_norm_backward(dy, total, weight, mean, rstd, dx, dweight, dbias, dtotal)
        return dx, dx, dweight, dbias  # without dropout the branch's gradient is x's

    def definition(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
        total = x + branch
        return F.layer_norm(total, total.shape[-1:], weight, bias, EPS), total

    moved = (_bytes(x, branch, y, total), _bytes(dy, total, dtotal, dx))
    peers = {"add, F.layer_norm": definition}
    inputs = (x, branch, weight, bias)
    return Work(inputs, (dy, dtotal), definition, forward, backward, peers, moved)


def _bias_gelu(s: Scale, new: partial[Tensor]) -> Work:
    x, dy, bias = new(s.rows, 4 * s.width), new(s.rows, 4 * s.width), new(4 * s.width)
    y, dx, dbias = torch.empty_like(x), torch.empty_like(x), torch.empty_like(bias)

    def forward() -> Tensors:
        bias_gelu(x, bias, y)
        return (y,)

    def backward() -> Tensors:
        bias_gelu_backward(dy, x, bias, dx, dbias)
        return dx, dbias

    def definition(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias, approximate="tanh")

    moved = (_bytes(x, y), _bytes(dy, x, dx))
    peers = {"add, F.gelu": definition}
    return Work((x, bias), (dy,), definition, forward, backward, peers, moved)


def _linear(s: Scale, new: partial[Tensor], rows: int = 0) -> Work:
    rows = rows or s.rows
    x, bias = new(rows, s.width), new(4 * s.width)
    weight = new(4 * s.width, s.width) * s.width**-0.5
    y, pre = x.new_empty(rows, 4 * s.width), x.new_empty(rows, 4 * s.width)

    def forward() -> Tensors:
        linear(x, weight, bias, y, pre, gelu=True)
        return y, pre

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
        pre = F.linear(x, weight, bias)
        return F.gelu(pre, approximate="tanh"), pre

    peers = {"addmm, F.gelu": definition}
    moved, operations = (_bytes(x, weight, y, pre), 0.0), (2.0 * x.numel() * weight.shape[0], 0.0)
    inputs, upstream = (x, weight, bias), (new(*y.shape), new(*y.shape))
    return Work(inputs, upstream, definition, forward, None, peers, moved, operations)


def _quantized_linear(s: Scale, new: partial[Tensor], precision: str, rows: int = 8) -> Work:
    depth = -(-s.width // RUN) * RUN
    x, bias = new(rows, depth), new(4 * s.width)
    weight = quantize_weight(new(4 * s.width, depth) * depth**-0.5, precision)
    y = x.new_empty(rows, 4 * s.width)

    def forward() -> Tensors:
        quantized_linear(x, weight, bias, y)
        return (y,)

    def definition(x: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, dequantize(weight, x.dtype), bias)

    peers = {"dequantize, addmm": definition}
    moved, operations = (_bytes(x, *weight, y), 0.0), (2.0 * y.numel() * depth, 0.0)
    return Work((x, bias), (new(*y.shape),), definition, forward, None, peers, moved, operations)


def _attention(s: Scale, new: partial[Tensor], dropout_p: float = 0.0) -> Work:
    packed = new(s.batch, s.tokens, 3, s.heads, s.head_dim)  # as one product leaves q, k and v
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    dq, dk, dv = torch.empty_like(packed).permute(2, 0, 3, 1, 4)
    dout = new(s.batch, s.tokens, s.heads, s.head_dim).transpose(1, 2)
    out = torch.empty_like(dout)
    lse = torch.empty(q.shape[:3], device=q.device)
    scale = s.head_dim**-0.5

    def forward() -> Tensors:
        causal_attention(q, k, v, scale, out, lse, dropout_p, SEED)
        return (out,)

    def backward() -> Tensors:
        causal_attention_backward(dout, q, k, v, out, lse, scale, dq, dk, dv, dropout_p, SEED)
        return dq, dk, dv

    def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)

    definition = partial(sdpa, SDPBackend.MATH)
    backends = (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    )
    peers = {f"SDPA {b.name.split('_')[0].lower()}": partial(sdpa, b) for b in backends}
    products = 2.0 * s.batch * s.heads * s.tokens * (s.tokens + 1) / 2 * s.head_dim
    moved = (_bytes(q, k, v, out), _bytes(q, k, v, out, dout, dq, dk, dv))
    work = Work((q, k, v), (dout,), definition, forward, backward, peers, moved)
    work.operations = (2 * products, 5 * products)
    return work


def _embedding(s: Scale, new: partial[Tensor]) -> Work:
    idx = torch.randint(s.vocabulary, (s.batch, s.tokens), device=new.keywords["device"])
    tok, pos = new(s.vocabulary, s.width), new(s.tokens, s.width)
    y, dy = (new(s.batch, s.tokens, s.width) for _ in range(2))
    dtok, dpos = torch.empty_like(tok), torch.empty_like(pos)

    def forward() -> Tensors:
        embedding(idx, tok, pos, 0, y)
        return (y,)

    def backward() -> Tensors:
        embedding_backward(dy, idx, dtok, dpos, 0)
        return dtok, dpos

    def definition(tok: Tensor, pos: Tensor) -> Tensor:
        return F.embedding(idx, tok) + pos[: s.tokens]

    moved = (2 * _bytes(y), _bytes(dy, dtok, dpos))
    peers = {"F.embedding, add": definition}
    return Work((tok, pos), (dy,), definition, forward, backward, peers, moved)


def _cross_entropy(s: Scale, new: partial[Tensor]) -> Work:
    rows = min(s.rows, 8192)
    logits, dloss = new(rows, s.vocabulary), torch.ones(rows, device=new.keywords["device"])
    targets = torch.randint(s.vocabulary, (rows,), device=logits.device)
    loss, lse = torch.empty_like(dloss), torch.empty_like(dloss, dtype=torch.float64)
    kept = logits.clone()

    def forward() -> Tensors:
        cross_entropy(kept, targets, IGNORED, loss, lse)
        return (loss,)

    def backward() -> Tensors:
        cross_entropy_backward(kept, targets, IGNORED, lse, dloss)  # in place
        return (kept,)

    def definition(logits: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, targets, reduction="none")

    liger = _liger("liger_cross_entropy", lambda f: lambda x: f(x, targets, reduction="none"))
    peers: dict[str, Function] = {
        "F.cross_entropy": lambda x: F.cross_entropy(x, targets, reduction="none"),
        **liger,
    }
    moved = (_bytes(logits), 2 * _bytes(logits))
    return Work((logits,), (dloss,), definition, forward, backward, peers, moved)


def _linear_cross_entropy(s: Scale, new: partial[Tensor]) -> Work:
    rows = min(s.rows, 16384)
    x, weight = new(rows, s.width), new(s.vocabulary, s.width) * s.width**-0.5
    targets = torch.randint(s.vocabulary, (rows,), device=x.device)
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    loss, upstream = torch.empty(rows, device=x.device), torch.ones(rows, device=x.device)

    def forward() -> Tensors:
        linear_cross_entropy(x, weight, targets, IGNORED, loss)
        return (loss,)

    def backward() -> Tensors:
        linear_cross_entropy(x, weight, targets, IGNORED, loss, upstream, dx, dweight)
        return dx, dweight

    def definition(x: Tensor, weight: Tensor) -> Tensor:
        logits = x @ weight.T
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, targets, reduction="none")

    name = "liger_fused_linear_cross_entropy"
    liger = _liger(name, lambda f: lambda x, weight: f(x, weight, targets, reduction="sum"))
    peers: dict[str, Function] = {"mm, F.cross_entropy": definition, **liger}
    products = 2.0 * x.numel() * s.vocabulary
    work = Work((x, weight), (upstream,), definition, forward, backward, peers, whole=True)
    work.operations, work.moved = (products, 3 * products), (0.0, _bytes(x, weight, dx, dweight))
    return work


def _decode(s: Scale, new: partial[Tensor]) -> Work:
    capacity = s.tokens
    filled = capacity - 7 if capacity > 7 else capacity
    q = new(s.batch, s.heads, 1, s.head_dim)
    keys, values = (new(s.batch, s.heads, capacity, s.head_dim) for _ in range(2))
    length = torch.full((s.batch,), filled, dtype=torch.int32, device=q.device)
    out, scale = torch.empty_like(q), s.head_dim**-0.5

    def forward() -> Tensors:
        decode_attention(q, keys, values, length, scale, out)
        return (out,)

    def definition(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, keys[:, :, :filled], values[:, :, :filled])

    moved = (_bytes(keys, values) * filled / capacity, 0.0)
    work = Work((q, keys, values), (new(*q.shape),), definition, forward)
    work.peers, work.moved = {"SDPA": definition}, moved
    return work


OPERATIONS: dict[str, Callable[[Scale, partial[Tensor]], Work]] = {
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "bias_gelu": _bias_gelu,
    "linear": _linear,
    "linear, 8 rows": partial(_linear, rows=8),
    "quantized_linear, int8, 8 rows": partial(_quantized_linear, precision="int8"),
    "quantized_linear, int4, 8 rows": partial(_quantized_linear, precision="int4"),
    "causal_attention": _attention,
    "decode_attention": _decode,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}
# Dropout's random numbers are not the peers', so these are only timed.
TIMED = OPERATIONS | {"causal_attention, dropout 0.1": partial(_attention, dropout_p=0.1)}


def build(name: str, scale: Scale, dtype: torch.dtype, device: torch.device) -> Work:
    """The operation on random inputs of that size and dtype."""
    torch.manual_seed(123)
    return TIMED[name](scale, partial(torch.randn, dtype=dtype, device=device))
