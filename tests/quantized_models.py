"""What the test files of quantised models share: small models, LoRA, a hook."""

import torch
from pairs import CONFIG, pair, some_ids
from torch import nn

import fastgpt
from fastgpt.quantized_weight import PRECISIONS

WIDE = CONFIG | {"emb_dim": 96}
KINDS = [(precision, 32) for precision in PRECISIONS] + [("int4", 64)]


def full(tied=False, **changes):
    model, _ = pair(WIDE | {"emb_dim": 192} if changes.pop("wide", False) else WIDE, **changes)
    if tied:
        model.out_head.weight = model.tok_emb.weight
    return model.eval()


def quantized(precision="int8", tied=False, group=32):
    return fastgpt.quantize(full(tied, wide=group == 64), precision, group)


def logits(model):
    with torch.no_grad():
        return model(some_ids())


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids)[:, -1]


class Beside(nn.Module):
    """LoRA as in the book's appendix E."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.randn(linear.in_features, 4) * 0.02)
        self.B = nn.Parameter(torch.zeros(4, linear.out_features))

    def forward(self, x):
        return self.linear(x) + x @ self.A @ self.B


def put_lora(module):
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Beside(child))
        else:
            put_lora(child)


def hook(model):
    model.trf_blocks[1].att.W_key.register_forward_hook(lambda *args: None)
