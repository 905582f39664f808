"""Models of random weights whose greedy text is known beforehand: one in loops, one that people
wrote.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from fastgpt.tokenizer import gpt2_encoding

_SURE = 10.0  # a logit that none of the random ones reaches


def source(module: str, tokens: int) -> Tensor:
    """So many tokens from the middle of this Python module's source, [tokens].

    Raises:
        EncodingError: GPT-2's token table is not available.
    """
    text = inspect.getsource(importlib.import_module(module))
    ids = gpt2_encoding().encode(text)
    start = (len(ids) - tokens) // 2
    return torch.tensor(ids[start : start + tokens])


@torch.no_grad()
def foretell_loops(model: Any, loop: int) -> None:
    """Changes the head so that each token is followed by the next of its loop."""
    ids = torch.arange(len(model.tok_emb.weight))
    before = ids // loop * loop + (ids - 1) % loop
    model.out_head.weight.copy_(model.tok_emb.weight[before.clamp(max=len(ids) - 1)])


@torch.no_grad()
def foretell_text(model: Any, ids: Tensor) -> None:
    """Changes the head so that from any beginning of the text the model goes on with that text.

    ids: [T], at most one token more than the model is wide: the head's rows are the least squares
    solution of which token follows each of T - 1.
    """
    found: list[Tensor] = []
    hook = model.out_head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    model(ids[None, :-1])
    hook.remove()
    tokens, which = ids[1:].unique(return_inverse=True)
    right = torch.nn.functional.one_hot(which).double() * _SURE
    solution = torch.linalg.lstsq(found[0][0].double(), right, driver="gelsd").solution
    model.out_head.weight[tokens] = solution.T.to(model.out_head.weight.dtype)
