"""Chapter 6: fine-tune a classifier, whose head has two classes and is read at the last token.

    python examples/classify.py --model run

Only the last block, the final norm and the new head are trained; the frozen part stays fused.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from start import HERE, arguments, start_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fastgpt.tokenizer import gpt2_encoding

CLASSES = ("ham", "spam")
PAD = 50256  # <|endoftext|>


def read_messages(path: Path, context: int) -> TensorDataset:
    """Lines of label, tab, text -> token ids [N, T], padded to the longest, and classes [N]."""
    tokenizer = gpt2_encoding()
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    ids = [tokenizer.encode(text)[:context] for _, text in rows]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [PAD] * (longest - len(row)) for row in ids])
    return TensorDataset(padded, torch.tensor([CLASSES.index(label) for label, _ in rows]))


def last_token_loss(model: nn.Module, inputs: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs)[:, -1, :], classes)


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader, device: str) -> float:
    """The share of messages that the model classifies correctly."""
    model.eval()
    right = [
        (model(inputs.to(device))[:, -1, :].argmax(-1) == classes.to(device)).float()
        for inputs, classes in loader
    ]
    model.train()
    return torch.cat(right).mean().item()


def train(model: nn.Module, loader: DataLoader, epochs: int, lr: float, device: str) -> list[float]:
    """The book's loop; returns the mean loss of each epoch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.1)
    means = []
    model.train()
    for epoch in range(1, epochs + 1):
        losses = []
        for inputs, classes in loader:
            optimizer.zero_grad()
            loss = last_token_loss(model, inputs.to(device), classes.to(device))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        print(f"epoch {epoch}: loss {means[-1]:.3f}, {accuracy(model, loader, device):.0%} right")
    return means


def as_classifier(model: nn.Module) -> nn.Module:
    """Freezes the model except for the last block, the final norm and a new head of two classes."""
    model.requires_grad_(False)
    width = model.out_head.in_features
    model.out_head = nn.Linear(width, len(CLASSES)).to(model.out_head.weight.device)
    model.trf_blocks[-1].requires_grad_(True)
    model.final_norm.requires_grad_(True)
    return model


def main(argv: list[str] | None = None) -> list[float]:
    """Trains; returns the losses."""
    parser = arguments(__doc__.split("\n")[0], epochs=5, batch=8, lr=5e-5)
    parser.add_argument("--messages", type=Path, default=HERE / "messages.tsv")
    args = parser.parse_args(argv)

    model = as_classifier(start_model(args, drop_rate=0.0, qkv_bias=True))
    messages = read_messages(args.messages, model.cfg["context_length"])
    loader = DataLoader(messages, args.batch, shuffle=True)
    return train(model, loader, args.epochs, args.lr, args.device)


if __name__ == "__main__":
    main()
