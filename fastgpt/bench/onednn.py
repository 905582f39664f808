"""PyTorch's fused operations with oneDNN's products, their weights packed once. On AMD's processors
they take AVX-512 where PyTorch's usual product library takes AVX2.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import torch_state
from fastgpt.bench.torch_gpt import TorchGPT


def onednn(book: Any, cfg: dict[str, Any], precision: str) -> TorchGPT:
    """The book's model in float32 or bfloat16, for inference. Raises RuntimeError without oneDNN,
    or if it has no bfloat16 on this processor.
    """
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("this build of torch has no oneDNN")
    if precision == "bfloat16":
        if not torch_state.onednn_has_bfloat16():
            raise RuntimeError("oneDNN has no bfloat16 on this processor")
        book = copy.deepcopy(book).bfloat16()
    model = TorchGPT(book, cfg).eval()
    for block in model.blocks:
        for name in ("qkv", "out_proj", "widen", "narrow"):
            setattr(block, name, _Packed(getattr(block, name)))
    model.out_head = _Packed(model.out_head)
    return model


class _Packed(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.data
        self.product = torch_state.PackedOneDNN(linear.weight.data, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.product(x)
        return y
