"""What the examples share: their common arguments and their initial model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastgpt import GPTModel
from fastgpt.training.settings import read_config

HERE = Path(__file__).resolve().parent


def arguments(description: str, *, epochs: int, batch: int, lr: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config", default="124M", help="124M, 355M, 774M, 1558M, toy or a JSON file"
    )
    parser.add_argument("--model", help="initial weights: gpt2, or a folder or file")
    parser.add_argument("--context", type=int, default=256, help="tokens (%(default)s)")
    parser.add_argument("--epochs", type=int, default=epochs, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=batch, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=lr, help="(%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def start_model(args: argparse.Namespace, **changes: float | bool) -> GPTModel:
    """The model of --model, or a new one of --config."""
    torch.manual_seed(123)
    if args.model:
        model = GPTModel.from_pretrained(args.model).train()
    else:
        cfg = read_config(args.config)
        model = GPTModel(cfg | {"context_length": args.context} | changes)
    return model.to(args.device)
