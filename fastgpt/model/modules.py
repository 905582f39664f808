"""The pieces of the book's GPT under its names, fused where nothing watches what is between them.

The module tree, the parameters' order, the state dict and the random draws are the book's. Each
forward below fuses the modules that nobody has modified (``fusable.is_unmodified``) and calls every
other one as a module, so that a replaced, hooked or wrapped piece runs as its owner wrote it and
the rest stays fused. No weight is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import dispatch, ops, reference
from fastgpt.config import Config
from fastgpt.cpu.records import Block, BlockRecord, Norm
from fastgpt.model.cache import CacheTransaction, cached_tokens, extended
from fastgpt.model.fusable import (
    Obstacle,
    alone_unmodified,
    classes_unmodified,
    drop_probability,
    dropout_obstacle,
    fusable_class,
    is_unmodified,
    is_unmodified_linear,
    obstacle,
)
from fastgpt.model.packing import pack_on_gpu, weights_lie_at
from fastgpt.model.quantization import linear_obstacle, linear_of

if TYPE_CHECKING:
    from typing_extensions import Self


@fusable_class
class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, biased variance, eps 1e-5; scale and shift: [emb_dim]."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., emb_dim] -> [..., emb_dim]."""
        return ops.layer_norm(x, self.scale, self.shift, self.eps)


@fusable_class
class GELU(nn.Module):
    """The tanh form of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return ops.gelu(x)


@fusable_class
class Dropout(nn.Dropout):
    """nn.Dropout that draws the same mask whether it runs by itself or fused."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not self.training or self.inplace:
            return super().forward(x)
        return ops.dropout(x, self.p)


@fusable_class
class FeedForward(nn.Module):
    """Linear, GELU, Linear: emb_dim -> 4 emb_dim -> emb_dim.

    Args:
        cfg: a mapping with emb_dim.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        width = cfg["emb_dim"]
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layers = nn.Sequential(up, GELU(), down)

    def forward(self, x: Tensor) -> Tensor:
        """[..., emb_dim] -> [..., emb_dim]."""
        if not self._fusable():
            return self.layers(x)
        up: Any = self.layers[0]
        return linear(self.layers[2], ops.linear_gelu(x, up.weight, up.bias, owner=self))

    def _fusable(self) -> bool:
        if not is_unmodified(self.layers, nn.Sequential) or len(self.layers) != 3:
            return False
        up, act, _ = self.layers
        return (
            is_unmodified(up, nn.Linear)
            and is_unmodified(act, GELU)
            and up.bias is not None
            and not dispatch.transformed()
            and not torch.compiler.is_compiling()
        )


@fusable_class
class MultiHeadAttention(nn.Module):
    """Causal attention with separate query, key, value and output projections.

    Args:
        d_in: width of the input.
        d_out: width of the output, a multiple of num_heads.
        context_length: the most tokens a sequence may have.
        dropout: probability of dropping an attention weight while training.
        num_heads: number of heads.
        qkv_bias: whether the query, key and value projections have a bias.
        disable_causal_mask: every token sees all others; there is no mask then, and a sequence may
            have any length.

    Raises:
        ValueError: d_out is not divisible by num_heads.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
        disable_causal_mask: bool = False,
    ) -> None:
        super().__init__()
        # numpy's narrow integers would overflow in arithmetic.
        d_out, num_heads, context_length = int(d_out), int(num_heads), int(context_length)
        if num_heads <= 0 or d_out % num_heads != 0:
            raise ValueError(f"d_out {d_out} must be divisible by num_heads {num_heads}")
        self.d_out = d_out
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.context_length = context_length
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = Dropout(dropout)
        self.disable_causal_mask = disable_causal_mask
        # A key of the state dict; allocated on first read or write.
        if not disable_causal_mask:
            self._buffers["mask"] = None
        pack_on_gpu(self._projections(), {})

    @property
    def mask(self) -> Tensor:
        """The causal mask, [context_length, context_length], 1 where a key is hidden; an edited one
        is honoured. AttributeError if the causal mask is disabled.
        """
        if self.disable_causal_mask:
            raise AttributeError("the causal mask is disabled")
        if self._buffers.get("mask") is None:
            self._buffers["mask"] = self._causal_mask()
        return self._buffers["mask"]  # type: ignore[return-value]

    def forward(self, x: Tensor, cache: Any = None, layer: int = 0) -> Tensor:
        """[B, T, d_in] -> [B, T, d_out], behind the tokens in the cache's slot for this layer.

        Raises:
            ValueError: the tokens, cached ones included, are more than the context length, or
                there is a cache and no causal mask.
        """
        if cache is not None and self.disable_causal_mask:
            raise ValueError(
                "without a causal mask no cache can be used: the tokens in it would have to see "
                "those that follow"
            )
        B, T, _ = x.shape
        past = cached_tokens(cache, layer)
        self.check_length(past + T)
        heads = (self.num_heads, self.head_dim)
        k, q, v = (t.unflatten(-1, heads).transpose(1, 2) for t in self._projected(x))
        first, limit = 0, self.max_context()
        if isinstance(cache, CacheTransaction):
            first, limit = cache.first, cache.limit
        if cache is not None:
            k, v = extended(cache.get(layer), k, v, limit)
            cache.update(layer, (k, v))
        dropout_p = drop_probability(self.dropout)
        if self.is_causal() and dropout_p is not None:
            context = ops.causal_attention(q, k, v, dropout_p=dropout_p)
        else:
            hidden = self._hidden(first, past, T, q.device)
            context = reference.causal_attention(q, k, v, hidden, self.dropout)
        return linear(self.out_proj, context.transpose(1, 2).reshape(B, T, self.d_out))

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Keys, queries and values, each [B, T, d_out]."""
        layers: tuple[Any, ...] = (self.W_query, self.W_key, self.W_value)
        if not torch.compiler.is_compiling() and all(map(is_unmodified_linear, layers)):
            weights, biases = ([getattr(m, n) for m in layers] for n in ("weight", "bias"))
            packed = ops.packed_linear(x, weights, biases)
            if packed is not None:
                return packed[1], packed[0], packed[2]
        return linear(self.W_key, x), linear(self.W_query, x), linear(self.W_value, x)

    def _projections(self) -> tuple[Any, ...]:
        """The layers of queries, keys and values; None for one that a subclass removed."""
        return tuple(self._modules.get(name) for name in ("W_query", "W_key", "W_value"))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = weights_lie_at(self._projections())
        super()._apply(fn, recurse)
        pack_on_gpu(self._projections(), before)
        return self

    def __setstate__(self, state: Any) -> None:
        """What deepcopy and unpickling end with; both make each weight anew."""
        super().__setstate__(state)
        pack_on_gpu(self._projections(), {})

    def check_length(self, tokens: int) -> None:
        """
        Raises:
            ValueError: so many tokens, cached ones included, are more than the context length,
                which counts only where there is a mask.
        """
        if tokens > (longest := self.max_context()) and not self.disable_causal_mask:
            raise ValueError(f"{tokens} tokens are more than the context length {longest}")

    def max_context(self) -> int:
        """The most tokens that the mask has room for."""
        mask = self._buffers.get("mask")
        return self.context_length if mask is None else mask.shape[0]

    def set_mask(self, mask: Tensor) -> None:
        """Takes over a mask, [context_length, context_length]; a causal one is not kept."""
        self._buffers["mask"] = None if is_causal(mask) else mask

    def is_causal(self) -> bool:
        """Whether the mask is the causal one; said of an edited one only outside torch.compile."""
        if self.disable_causal_mask:
            return False
        mask = self._buffers.get("mask")
        if mask is None:
            return True
        return not torch.compiler.is_compiling() and is_causal(mask)

    def _hidden(self, first: int, past: int, T: int, device: torch.device) -> Tensor:
        """[T, past + T], true where a key is hidden from the tokens behind `past` cached ones, of
        which the first has this position; allocating no mask if none was set.
        """
        if self.disable_causal_mask:
            return torch.zeros(T, past + T, dtype=torch.bool, device=device)
        mask = self._buffers.get("mask")
        if mask is None:
            return torch.ones(T, past + T, dtype=torch.bool, device=device).triu(past + 1)
        new, end = first + past, first + past + T
        self.check_length(end)
        return mask.bool()[new:end, first:end]

    def _causal_mask(self) -> Tensor:
        """As the book's buffer would be after every .to(): on the parameters' device, in their
        dtype.
        """
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        size = (self.context_length, self.context_length)
        return torch.ones(size, device=like.device, dtype=like.dtype).triu(1)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._buffers.get("mask") is None and not self.disable_causal_mask:
            destination[prefix + "mask"] = self._causal_mask()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        errors = missing_keys, unexpected_keys, error_msgs
        if self.disable_causal_mask:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *errors)
            return
        key = prefix + "mask"
        rest = {k: v for k, v in state_dict.items() if k != key}
        held = self._buffers.get("mask")
        self._buffers["mask"] = None  # a checkpoint without a mask is fine
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, *errors)
        self._buffers["mask"] = held
        mask = state_dict.get(key)
        if mask is None:
            return
        size = (self.max_context(), self.max_context())
        if tuple(mask.shape) != size:
            error_msgs.append(
                f"size mismatch for {key}: {tuple(mask.shape)} in the checkpoint, "
                f"{size} in the model."
            )
        elif mask.is_meta or is_causal(mask):
            self._buffers["mask"] = None
            self.context_length = size[0]
        elif local_metadata.get("assign_to_params_buffers", False):
            self._buffers["mask"] = mask
        else:
            self.mask.copy_(mask)


@fusable_class
class TransformerBlock(nn.Module):
    """LayerNorm, attention, shortcut; LayerNorm, feed-forward, shortcut.

    Args:
        cfg: a mapping with emb_dim, context_length, n_heads, drop_rate and qkv_bias.
        disable_causal_mask: every token sees all others.
    """

    def __init__(self, cfg: Config, disable_causal_mask: bool = False) -> None:
        super().__init__()
        self.att = MultiHeadAttention(
            d_in=cfg["emb_dim"],
            d_out=cfg["emb_dim"],
            context_length=cfg["context_length"],
            num_heads=cfg["n_heads"],
            dropout=cfg["drop_rate"],
            qkv_bias=cfg["qkv_bias"],
            disable_causal_mask=disable_causal_mask,
        )
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg["emb_dim"])
        self.norm2 = LayerNorm(cfg["emb_dim"])
        self.drop_shortcut = Dropout(cfg["drop_rate"])

    @property
    def drop_resid(self) -> nn.Module:
        """The name of drop_shortcut in the book's package."""
        return self.drop_shortcut

    def __setattr__(self, name, value):
        super().__setattr__("drop_shortcut" if name == "drop_resid" else name, value)

    def forward(self, x: Tensor, cache: Any = None, layer: int = 0) -> Tensor:
        """[B, T, emb_dim] -> [B, T, emb_dim]."""
        return added(*self.forward_residual(x, None, cache, layer, self))

    def forward_residual(
        self, x: Tensor, branch: Branch | None, cache: Any, layer: int, owner: nn.Module
    ) -> tuple[Tensor, Branch | None]:
        """The block on x + branch. If it does not run as a whole, the sum at its end and the
        dropout in front of it are left to the next norm.
        """
        b = self._whole_record(x) if cache is None else None
        if b is not None:
            x, branch = added(x, branch), None
            how = (b.n_heads, b.attention_p, b.shortcut_p, b.eps, owner)
            whole = ops.transformer_block(x, b.parameters, *how)
            if whole is not None:
                return whole, None
        # Of a block that is plainly ours nothing but products read the norms. A compiler sees to
        # the casts itself, and need not trace the question.
        narrow = not torch.compiler.is_compiling() and dispatch.autocasts(x)
        narrow = narrow and (b or self.record()) is not None
        x, h = add_norm(x, branch, self.norm1, narrow)
        # A replaced attention need not know of caches.
        attended = self.att(h) if cache is None else self.att(h, cache, layer)
        x, h = add_norm(x, Branch(attended, self.drop_shortcut), self.norm2, narrow)
        return x, Branch(self.ff(h), self.drop_shortcut)

    def _whole_record(self, x: Tensor) -> BlockRecord | None:
        """What the block on x consists of, if it may run as one operation.

        Raises:
            ValueError: the tokens are more than the block's context length.
        """
        if x.dim() != 3 or not dispatch.runs_whole(x):
            return None
        b = self.record()
        if b is None or x.shape[2] != b.width:
            return None
        self.att.check_length(x.shape[1])
        return b

    def record(self) -> BlockRecord | None:
        """What the block consists of; None if ``obstacles`` are in the way."""
        if not (classes_unmodified() and alone_unmodified(self, TransformerBlock)):
            return None
        pieces = self._modules
        att: Any = pieces.get("att")
        ff: Any = pieces.get("ff")
        if not (alone_unmodified(att, MultiHeadAttention) and alone_unmodified(ff, FeedForward)):
            return None
        inner, layers = att._modules, ff._modules.get("layers")
        if not (alone_unmodified(layers, nn.Sequential) and list(layers._modules) == _THREE):
            return None
        up, act, down = layers._modules.values()
        norm1: Any = pieces.get("norm1")
        norm2: Any = pieces.get("norm2")
        linears = [linear_of(layer) for layer in (*map(inner.get, _PROJECTIONS), up, down)]
        attention_p = drop_probability(inner.get("dropout"))
        shortcut_p = drop_probability(pieces.get("drop_shortcut"))
        if not (
            alone_unmodified(act, GELU)
            and alone_unmodified(norm1, LayerNorm)
            and alone_unmodified(norm2, LayerNorm)
            and norm1.eps == norm2.eps
            and all(layer is not None for layer in linears)
            and attention_p is not None
            and shortcut_p is not None
            and att.num_heads * att.head_dim == att.d_out
            and att.is_causal()
        ):
            return None
        parts = (_norm_of(norm1), *linears[:4], _norm_of(norm2), *linears[4:])
        parameters = Block(*parts)  # type: ignore[arg-type]
        rates = (norm1.eps, attention_p, shortcut_p)
        return BlockRecord(parameters, att.d_out, att.num_heads, *rates, att.max_context())

    def obstacles(self) -> list[Obstacle]:
        """All that keeps the block from running as one operation."""
        pieces = self._modules
        att, ff = pieces.get("att"), pieces.get("ff")
        found = [
            obstacle(self, TransformerBlock, ""),
            obstacle(att, MultiHeadAttention, "att"),
            obstacle(ff, FeedForward, "ff"),
            obstacle(pieces.get("norm1"), LayerNorm, "norm1"),
            obstacle(pieces.get("norm2"), LayerNorm, "norm2"),
        ]
        dropouts = {"drop_shortcut": pieces.get("drop_shortcut")}
        if isinstance(att, MultiHeadAttention):
            found += [linear_obstacle(att._modules.get(n), f"att.{n}") for n in _PROJECTIONS]
            dropouts["att.dropout"] = att._modules.get("dropout")
            if att.disable_causal_mask:
                found.append(Obstacle("att", "no causal mask"))
            elif not att.is_causal():
                found.append(Obstacle("att.mask", "an edited mask"))
            if att.num_heads * att.head_dim != att.d_out:
                found.append(Obstacle("att", "heads that do not make up the width"))
        if isinstance(ff, FeedForward):
            layers = ff._modules.get("layers")
            found.append(obstacle(layers, nn.Sequential, "ff.layers"))
            names = list(getattr(layers, "_modules", ()))
            if names != _THREE:
                found.append(Obstacle("ff.layers", f"{len(names)} layers in place of 3"))
            else:
                up, act, down = layers._modules.values()  # type: ignore[union-attr]
                found += [linear_obstacle(up, "ff.layers.0"), obstacle(act, GELU, "ff.layers.1")]
                found.append(linear_obstacle(down, "ff.layers.2"))
        for path, dropout in dropouts.items():
            if drop_probability(dropout) is None:
                found.append(dropout_obstacle(dropout, path))
        eps = [getattr(pieces.get(name), "eps", None) for name in ("norm1", "norm2")]
        if eps[0] != eps[1]:
            found.append(Obstacle("norm2", f"eps {eps[1]}, norm1 has {eps[0]}"))
        return [one for one in found if one is not None]


_THREE = ["0", "1", "2"]
_PROJECTIONS = ("W_query", "W_key", "W_value", "out_proj")


def _norm_of(norm: Any) -> Norm:
    return Norm(norm._parameters.get("scale"), norm._parameters.get("shift"))


def is_causal(mask: Tensor) -> bool:
    hidden = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu(1)
    return torch.equal(mask.bool(), hidden)


class Branch(NamedTuple):
    """What is to be added to the residual stream, behind its dropout."""

    value: Tensor
    dropout: nn.Module


def added(x: Tensor, branch: Branch | None) -> Tensor:
    """The residual stream with the branch."""
    return x if branch is None else branch.dropout(branch.value) + x


def add_norm(
    x: Tensor, branch: Branch | None, norm: Any, narrow: bool = False
) -> tuple[Tensor, Tensor]:
    """The residual stream with the branch; and its norm, for which ``narrow`` is as in ops."""
    if branch is not None:
        value, dropout_p = branch.value, drop_probability(branch.dropout)
        if is_unmodified(norm, LayerNorm) and value.shape == x.shape and dropout_p is not None:
            how = (norm.scale, norm.shift, norm.eps, dropout_p, narrow)
            h, x = ops.add_layer_norm(x, value, *how)
            return x, h
        x = added(x, branch)
    return x, norm(x)


def linear(module: Any, x: Tensor) -> Tensor:
    """What the module makes of x, by the fused product where it is plainly an nn.Linear."""
    if not is_unmodified_linear(module) or torch.compiler.is_compiling():
        return module(x)
    return ops.linear(x, module.weight, module.bias, owner=module)
