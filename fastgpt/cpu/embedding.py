"""The sum of token and position embeddings on the CPU, with dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.cpu import _C
from fastgpt.cpu.records import data, double


def embedding(
    idx: Tensor,
    tok: Tensor,
    pos: Tensor,
    past: int,
    y: Tensor,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> None:
    """Writes y = dropout(tok[idx] + pos[past + t]).

    idx: [B, T] int32 or int64, contiguous and in range; tok: [V, D], pos: [C, D], y: [B, T, D],
    contiguous and float32.
    """
    if y.numel() == 0:
        return
    step = _step(idx, past, tok.shape[1], tok, pos, dropout_p, seed)
    _C.embedding(step, y.data_ptr(), torch.get_num_threads())


def embedding_backward(
    dy: Tensor,
    idx: Tensor,
    dtok: Tensor | None,
    dpos: Tensor | None,
    past: int,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> None:
    """Writes the gradients that are given, dtok [V, D] and dpos [C, D]; dy: [B, T, D]
    contiguous.
    """
    step = _step(idx, past, dy.shape[2], None, None, dropout_p, seed)
    vocab, context = (0 if d is None else d.shape[0] for d in (dtok, dpos))
    threads = torch.get_num_threads()
    _C.embedding_backward(step, dy.data_ptr(), data(dtok), vocab, data(dpos), context, threads)


def _step(
    idx: Tensor,
    past: int,
    width: int,
    tok: Tensor | None,
    pos: Tensor | None,
    dropout_p: float,
    seed: int,
) -> list[int]:
    """struct Embedding."""
    wide = int(idx.dtype is torch.int64)
    tables = (data(tok), data(pos))
    return [*idx.shape, past, width, idx.data_ptr(), wide, *tables, seed, double(dropout_p)]
