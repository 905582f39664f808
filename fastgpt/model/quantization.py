"""The layers that hold their weight in 8 or 4 bits, and a model's conversion to them.

The weight of such a layer belongs to it: it is a buffer, made once by a conversion that was asked
for by name, and has no gradient.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from fastgpt import dispatch, ops
from fastgpt.config import check_ids
from fastgpt.cpu.records import Dynamic, Linear
from fastgpt.model.cache import KVCache
from fastgpt.model.fusable import (
    KNOWN,
    Obstacle,
    alone_unmodified,
    classes_unmodified,
    fusable_class,
    has_own_parameters,
    modification,
    obstacle,
)
from fastgpt.quantized_weight import (
    Int4Weight,
    Int8Weight,
    QuantizedWeight,
    check_precision,
    dequantize,
    named_tensors,
    quantize_weight,
)

if TYPE_CHECKING:
    from typing_extensions import Self

M = TypeVar("M", bound=nn.Module)


class _Quantized(nn.Module):
    """A module whose buffers are a quantised weight: weight_int8 and scale, or weight_int4, scale
    and minimum.
    """

    precision: str

    def _hold(self, weight: QuantizedWeight, precision: str) -> None:
        self.precision = precision
        for name, tensor in named_tensors(weight).items():
            self.register_buffer(name, tensor)

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The buffers as the record that operations take."""
        held: Any = self._buffers
        if "weight_int8" in held:
            return Int8Weight(held["weight_int8"], held["scale"])
        return Int4Weight(held["weight_int4"], held["scale"], held["minimum"])

    @property
    def group(self) -> int | None:
        """How many neighbours share a scale; None if a whole row does."""
        weight = self.quantized_weight
        if isinstance(weight, Int8Weight):
            return None
        return 2 * weight.values.shape[1] // weight.scale.shape[1]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves the buffers and leaves their dtypes as they are. A tensor that two layers share
        changes in place, as parameters do, and stays shared.
        """
        held, own = self._buffers, vars(self)
        own["_buffers"] = {}
        try:
            super()._apply(fn, recurse)
        finally:
            own["_buffers"] = held
        for name, old in held.items():
            assert old is not None
            new = fn(old)
            if new.dtype != old.dtype:
                new = old.to(new.device)
            try:
                old.data = new
            except RuntimeError:  # a tensor of this kind can't become one of that: meta, a subclass
                held[name] = new
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """
        Raises:
            RuntimeError: gradients are wanted, which the weight cannot have.
        """
        if requires_grad:
            raise RuntimeError(
                f"the weight of a {type(self).__name__} is held in {self.precision} and cannot be "
                "trained: train a layer beside it (LoRA), or the model that was quantised"
            )
        return super().requires_grad_(False)


@fusable_class
class QuantizedLinear(_Quantized, nn.Linear):
    """x W^T + bias with W in 8 or 4 bits. An nn.Linear, for code that wraps those, without
    `weight`.

    Args:
        weight: of [out_features, in_features].
        bias: [out_features] or None; taken over, without a gradient.
        precision: "int8", "int8-dynamic" (which also rounds x to 8 bits) or "int4".
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, precision: str) -> None:
        nn.Module.__init__(self)
        self.out_features = weight.values.shape[0]
        self.in_features = weight.values.shape[1] * (2 if precision == "int4" else 1)
        own = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", own)
        self._hold(weight, precision)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in x's dtype."""
        dynamic = self.precision == "int8-dynamic"
        return ops.quantized_linear(x, self.quantized_weight, self.bias, dynamic)

    def reset_parameters(self) -> NoReturn:
        """
        Raises:
            RuntimeError: always; a weight in 8 or 4 bits cannot be drawn.
        """
        raise RuntimeError("a QuantizedLinear has no weight to initialise")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision}"


@fusable_class
class QuantizedEmbedding(_Quantized):
    """The rows of W that are looked up, dequantised; for a table that is also the head.

    Args:
        weight: of [num_embeddings, embedding_dim]; shared, not copied.
        precision: the head's.
        dtype: of the result; that of the model, which ``.to(dtype)`` changes.
    """

    def __init__(self, weight: QuantizedWeight, precision: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings = weight.values.shape[0]
        self.embedding_dim = weight.values.shape[1] * (2 if precision == "int4" else 1)
        self.dtype = dtype
        self._hold(weight, precision)

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids of any shape -> [..., embedding_dim].

        Raises:
            IndexError: an id is outside the table.
        """
        if not idx.is_meta and dispatch.readable(idx):
            check_ids(idx, self.num_embeddings)
        weight = self.quantized_weight
        rows = (t.index_select(0, idx.flatten()) for t in weight)
        return dequantize(type(weight)(*rows), self.dtype).unflatten(0, idx.shape)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def shares_weight_with(self, head: nn.Module) -> bool:
        """Whether the head has the same tensors."""
        if not isinstance(head, QuantizedLinear):
            return False
        ours, theirs = (module.quantized_weight.values for module in (self, head))
        return ours is theirs or (not ours.is_meta and ours.data_ptr() == theirs.data_ptr())

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, precision={self.precision}"


def linear_of(layer: Any) -> Linear | None:
    """What a linear layer consists of, quantised or not; None if it is modified."""
    if alone_unmodified(layer, nn.Linear):
        held = layer._parameters
        return Linear(held["weight"], held["bias"]) if has_own_parameters(layer) else None
    if not alone_unmodified(layer, QuantizedLinear) or "bias" not in layer._parameters:
        return None
    weight: Any = layer.quantized_weight
    dynamic = layer.precision == "int8-dynamic"
    return Linear(Dynamic(weight) if dynamic else weight, layer._parameters["bias"])


def linear_obstacle(module: Any, path: str) -> Obstacle | None:
    """What stands in the way of a linear layer, None if nothing does."""
    if classes_unmodified() and linear_of(module) is not None:
        return None
    cls = type(module) if isinstance(module, QuantizedLinear) else nn.Linear
    return obstacle(module, cls, path) or Obstacle(path, "a weight or bias that is no parameter")


def quantized_copy(model: M, precision: str, group: int = 32) -> M:
    """``fastgpt.quantize`` for a GPTModel, which may be on the meta device."""
    check_precision(precision, group)
    dtype, linears = _dtype(model), _linears(model)
    head, tok = (getattr(model, name)._parameters.get("weight") for name in ("out_head", "tok_emb"))
    made: dict[int, QuantizedWeight] = {}  # by weight: layers that share one go on sharing
    memo: dict[int, Any] = {}
    for path, linear in linears.items():
        weight, bias = linear._parameters["weight"], linear._parameters["bias"]
        assert weight is not None
        try:
            if id(weight) not in made:
                made[id(weight)] = quantize_weight(weight, precision, group)
        except ValueError as error:
            raise ValueError(f"{path}.weight cannot be quantised to {precision}: {error}") from None
        own = None if bias is None else bias.detach().clone()
        memo[id(linear)] = QuantizedLinear(made[id(weight)], own, precision)
    if head is not None and head is tok:
        memo[id(model.tok_emb)] = QuantizedEmbedding(made[id(head)], precision, dtype)
    for kept in vars(model).values():
        if isinstance(kept, KVCache):
            memo[id(kept)] = type(kept)(len(kept.cache))
    # What was made stands in for its original; everything else is copied.
    result = copy.deepcopy(model, memo)
    for parameter in result.parameters():
        parameter.requires_grad_(False)
    return result.eval()


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of all parameters; ValueError if there are two."""
    dtypes = {p.dtype: name for name, p in reversed(list(model.named_parameters()))}
    if len(dtypes) > 1:
        found = ", ".join(f"{n} is {str(d).removeprefix('torch.')}" for d, n in dtypes.items())
        raise ValueError(f"a model of several dtypes cannot be quantised: {found}")
    return next(iter(dtypes))


def _linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of the blocks and the head, by path.

    Raises:
        TypeError: there is a layer that cannot be quantised.
    """
    linears: dict[str, nn.Linear] = {}
    obstacles: list[Obstacle] = []

    def look_at(module: nn.Module, path: str) -> None:
        reason = _reason(module)
        if reason is not None:
            obstacles.append(Obstacle(path, reason))
        elif type(module) is nn.Linear:
            linears[path] = module
        else:
            for name, child in module.named_children():
                look_at(child, f"{path}.{name}")

    look_at(model.trf_blocks, "trf_blocks")
    look_at(model.out_head, "out_head")
    head, tok = linears.get("out_head"), model.tok_emb
    if head is not None and head._parameters["weight"] is tok._parameters.get("weight"):
        if not alone_unmodified(tok, nn.Embedding):
            obstacles.append(Obstacle("tok_emb", modification(tok, nn.Embedding)))
        elif tok.max_norm is not None:
            obstacles.append(Obstacle("tok_emb", "a max_norm"))
    if obstacles:
        path, reason = obstacles[0]
        rest = f" (and {len(obstacles) - 1} more layers)" if len(obstacles) > 1 else ""
        raise TypeError(f"{path} cannot be quantised: {reason}{rest}")
    return linears


def _reason(module: nn.Module) -> str | None:
    """Why a module can be neither quantised nor, with its children, looked through."""
    if isinstance(module, _Quantized):
        return f"already in {module.precision}"
    if type(module) is not nn.Linear:
        looked_through = type(module) in KNOWN or next(module.parameters(), None) is None
        return None if looked_through else f"a {type(module).__name__}"
    if not alone_unmodified(module, nn.Linear):
        return modification(module, nn.Linear)
    weight = module._parameters.get("weight")
    if not has_own_parameters(module) or type(weight) is not nn.Parameter:
        return "a weight that is not a plain parameter"
    return None
