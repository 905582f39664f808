"""Token embedding plus position embedding, with dropout: the start of the model."""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch
from fastgpt.config import check_ids
from fastgpt.ops.dropout import dropout
from fastgpt.ops.dropout_seed import draw_seed
from fastgpt.ops.id_check import check_on_gpu, raise_wrong_ids
from fastgpt.ops.mask_again import mask_again


@dispatch.falls_back
def embedding(
    idx: Tensor, tok: Tensor, pos: Tensor, past: int = 0, dropout_p: float = 0.0
) -> Tensor:
    """dropout(tok[idx] + pos[past], pos[past + 1], ...).

    Args:
        idx: [B, T] token ids, int32 or int64.
        tok: [V, D], any floating dtype.
        pos: [C, D] with C >= past + T.
        past: the position of the first token, at least 0.
        dropout_p: probability of dropping an element; the others are scaled by 1 / (1 - p). Draws
            one number from torch's generator for the device if not 0.

    Returns:
        [B, T, D].

    Raises:
        ValueError: the shapes do not fit each other, past is negative, or dropout_p is not a
            probability.
        TypeError: the ids are neither int32 nor int64.
        IndexError: an id is outside the vocabulary; of a training step on our GPU kernels the next
            step raises it, and the row of y is NaN.
        BackendError: a backend asked for by name cannot take these tensors.
    """
    if idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"token ids must be int32 or int64, got {idx.dtype}")
    if past < 0:
        raise ValueError(f"past {past} must be at least 0")
    fits = idx.dim() == tok.dim() == pos.dim() == 2 and tok.shape[1] == pos.shape[1]
    if not fits or past + idx.shape[1] > pos.shape[0]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (idx, tok, pos))
        raise ValueError(
            f"ids [B, T], tok [V, D] and pos [C >= {past} + T, D] do not fit: {shapes}"
        )
    if torch.compiler.is_compiling():
        return _torch(idx, tok, pos, past, dropout_p)
    kernels = dispatch.kernels("embedding", tok, pos)
    if idx.is_cuda and dispatch.readable(idx):
        check_on_gpu(idx, tok.shape[0])
    if kernels is None or idx.device != tok.device:
        raise_wrong_ids(idx)  # PyTorch's look-up would end the process's use of the GPU
        try:
            return _torch(idx, tok, pos, past, dropout_p)
        except (IndexError, RuntimeError):  # the latter of an empty vocabulary
            check_ids(idx, tok.shape[0])
            raise
    if not idx.is_cuda:
        check_ids(idx, tok.shape[0])
    step = (past, dropout_p, draw_seed(tok.device, dropout_p))
    if dispatch.needs_grad(tok, pos):
        return _Embedding.apply(kernels, idx, tok, pos, *step)
    return _forward(kernels, idx, tok, pos, *step)


def _torch(idx: Tensor, tok: Tensor, pos: Tensor, past: int, dropout_p: float) -> Tensor:
    at = torch.arange(past, past + idx.shape[1], device=pos.device)
    x = F.embedding(idx, tok) + F.embedding(at, pos)  # a wrapped table may know no slices
    return dropout(x, dropout_p)


def _forward(kernels, idx, tok, pos, past, dropout_p, seed):
    y = tok.new_empty(*idx.shape, tok.shape[1])
    tables = (tok.contiguous(), pos.contiguous())
    kernels.embedding(idx.contiguous(), *tables, past, y, dropout_p, seed)
    return y


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, idx, tok, pos, past, dropout_p, seed):
        ctx.save_for_backward(idx)
        ctx.kernels, ctx.shapes, ctx.step = kernels, (tok.shape, pos.shape), (past, dropout_p, seed)
        ctx.thread = threading.current_thread()  # backward runs in one of PyTorch's
        return _forward(kernels, idx, tok, pos, past, dropout_p, seed)

    @staticmethod
    @dispatch.falls_back
    def backward(ctx, dy):
        (idx,) = ctx.saved_tensors
        wanted, past = ctx.needs_input_grad[2:4], ctx.step[0]
        first_order = dispatch.first_order(ctx.kernels, dy)
        raise_wrong_ids(idx, ctx.thread, wait=not first_order)
        if first_order:
            grads = [
                dy.new_empty(shape) if want else None
                for shape, want in zip(ctx.shapes, wanted, strict=True)
            ]
            ctx.kernels.embedding_backward(dy.contiguous(), idx.contiguous(), *grads, *ctx.step)
        else:
            keep = mask_again(ctx.kernels, ctx.step[1:], dy.shape, dy.device)
            dy = dy if keep is None else dy * keep
            at = torch.arange(past, past + idx.shape[1], device=idx.device).expand_as(idx)
            grads = [
                torch.ops.aten.embedding_dense_backward(dy, ids, shape[0], -1, False)
                if want
                else None
                for ids, shape, want in zip((idx, at), ctx.shapes, wanted, strict=True)
            ]
        return None, None, *grads, None, None, None
