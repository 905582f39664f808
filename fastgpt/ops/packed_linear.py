"""Several linear layers on one input as one product, where their weights lie side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgpt import dispatch


def lay_side_by_side(parameters: Sequence[nn.Parameter]) -> None:
    """Moves these weights, of one shape, into one block."""
    with torch.no_grad():
        first = parameters[0]
        block = torch.empty((len(parameters), *first.shape), dtype=first.dtype, device=first.device)
        for part, parameter in zip(block, parameters, strict=True):
            part.copy_(parameter)
            parameter.data = part


def side_by_side(weights: Sequence[Tensor]) -> bool:
    """Whether each of these weights, of one shape, starts where the one before it ends."""
    first = weights[0]
    size = first.numel() * first.element_size()
    return all(
        type(w) in (Tensor, nn.Parameter)
        and w.dtype == first.dtype
        and w.shape == first.shape
        and w.is_contiguous()
        and w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and w.data_ptr() == first.data_ptr() + i * size
        for i, w in enumerate(weights)
    )


def packed_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...] | None:
    """x W^T + b for each of the layers, by one product.

    Args:
        x: [..., n_in], any floating dtype.
        weights: each [n_out, n_in].
        biases: each [n_out], or all None.

    Returns:
        For each layer [..., n_out], parts of one block; None if the Triton backend does not run,
        the weights are not side by side or some biases are missing: the layers must run one by one.

    Raises:
        BackendError: a backend asked for by name cannot take these tensors.
    """
    if dispatch.transformed():
        return None
    given = [b for b in biases if b is not None]
    fits = len(given) in (0, len(biases)) and x.shape[-1:] == weights[0].shape[1:]
    # On the CPU a whole block runs as one operation.
    elsewhere = weights[0].is_cpu and dispatch.requested() != "triton"
    if elsewhere or not fits or not side_by_side(weights):
        return None
    if dispatch.choose("linear", *weights, *given, beside=(x,)) != "triton":
        return None
    dtype = x.dtype
    if dispatch.autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
    elif dtype != weights[0].dtype:
        return None
    return _PackedLinear.apply(x.to(dtype), len(weights), *weights, *given)


def _pack(weights: Sequence[Tensor]) -> Tensor:
    """[n n_out, n_in] over all of them."""
    n_out, n_in = weights[0].shape
    return weights[0].detach().as_strided((len(weights) * n_out, n_in), (n_in, 1))


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n, *parameters):
        weights, biases = parameters[:n], parameters[n:]
        ctx.save_for_backward(x, *weights)
        ctx.biases = len(biases)
        bias = torch.cat(biases).to(x.dtype) if biases else None
        y = F.linear(x, _pack(weights).to(x.dtype), bias)
        return y.unflatten(-1, (n, -1)).unbind(-2)

    @staticmethod
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        n, wanted = len(weights), ctx.needs_input_grad
        if dispatch.first_order(None, *dys) and side_by_side(weights):
            dy = _joined(dys)
            dx = dy @ _pack(weights).to(x.dtype) if wanted[0] else None
            dy = dy.flatten(0, -2)
            dweights = [None] * n
            if any(wanted[2 : 2 + n]):
                dweights = (dy.mT @ x.flatten(0, -2)).chunk(n)
            dbiases = dy.sum(0).chunk(n) if any(wanted[2 + n :]) else [None] * ctx.biases
        else:  # differentiable itself
            parts = list(zip(dys, weights, strict=True))
            dx = sum(dy @ w.to(x.dtype) for dy, w in parts) if wanted[0] else None
            rows = [dy.flatten(0, -2) for dy in dys]
            dweights = [dy.mT @ x.flatten(0, -2) for dy in rows]
            dbiases = [dy.sum(0) for dy in rows][: ctx.biases]
        grads = (*dweights, *dbiases)
        return dx, None, *(g if w else None for g, w in zip(grads, wanted[2:], strict=True))


def _joined(dys: Sequence[Tensor]) -> Tensor:
    """[..., n n_out]; parts of one block, as attention leaves them, are not copied."""
    first = dys[0]
    shape = (*first.shape[:-1], len(dys) * first.shape[-1])
    strides = torch.empty(shape, device="meta").stride()
    part = first.shape[-1] * first.element_size()
    adjacent = all(
        dy.stride() == strides
        and dy.data_ptr() == first.data_ptr() + i * part
        and dy.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for i, dy in enumerate(dys)
    )
    return first.as_strided(shape, strides) if adjacent else torch.cat(list(dys), dim=-1)
