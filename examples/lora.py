"""Appendix E: chapter 6's classifier with LoRA, a low-rank update beside each frozen layer.

    python examples/lora.py --model run --rank 16

The wrappers replace `nn.Linear` and run as ordinary modules; norms, attention and GELU between them
stay fused.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from classify import CLASSES, read_messages, train
from start import HERE, arguments, start_model
from torch import Tensor, nn
from torch.utils.data import DataLoader


class LoRALayer(nn.Module):
    """x -> alpha x A B, zero at first; A: [in_dim, rank], B: [rank, out_dim]."""

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(in_dim, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * (x @ self.A @ self.B)


class LinearWithLoRA(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha)
        self.lora = lora.to(linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


def replace_linear(module: nn.Module, rank: int, alpha: float) -> None:
    """Replaces every nn.Linear by a wrapper of it."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, LinearWithLoRA(child, rank, alpha))
        else:
            replace_linear(child, rank, alpha)


def main(argv: list[str] | None = None) -> list[float]:
    """Trains; returns the losses."""
    parser = arguments(__doc__.split("\n")[0], epochs=5, batch=8, lr=5e-5)
    parser.add_argument("--messages", type=Path, default=HERE / "messages.tsv")
    parser.add_argument("--rank", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--alpha", type=float, default=16, help="(%(default)s)")
    args = parser.parse_args(argv)

    model = start_model(args, drop_rate=0.0, qkv_bias=True)
    model.out_head = nn.Linear(model.cfg["emb_dim"], len(CLASSES)).to(args.device)
    model.requires_grad_(False)
    total = sum(p.numel() for p in model.parameters())
    replace_linear(model, args.rank, args.alpha)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"trains {trained:,} parameters; {total:,} are frozen")

    messages = read_messages(args.messages, model.cfg["context_length"])
    loader = DataLoader(messages, args.batch, shuffle=True)
    return train(model, loader, args.epochs, args.lr, args.device)


if __name__ == "__main__":
    main()
