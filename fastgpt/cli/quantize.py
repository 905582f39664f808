"""`fastgpt quantize`: writes a model with its weights in 8 or 4 bits."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastgpt.cli.usage import Commands, UsageError
from fastgpt.quantized_weight import GROUPS, PRECISIONS
from fastgpt.training.settings import SettingsError, load_model
from fastgpt.weights.files import NAMES
from fastgpt.weights.save import WEIGHTS, cut_short


def add_to(commands: Commands) -> None:
    sub = commands.add_parser(
        "quantize",
        help="write a model with its weights in 8 or 4 bits",
        description="Load MODEL, quantise the weights of its linear layers, and write it to DIR, "
        "for `fastgpt generate --model DIR` and GPTModel.from_pretrained.",
    )
    sub.add_argument("model", metavar="MODEL", help="gpt2, or a folder or file of weights")
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    add_precision(sub, "--precision", "int8")
    sub.add_argument(
        "--group", type=int, choices=GROUPS, default=32, help="weights per scale in int4 (32)"
    )
    sub.set_defaults(run=run_quantize)


def add_precision(sub: argparse.ArgumentParser, option: str, default: str | None) -> None:
    """Adds an option that takes a precision."""
    sub.add_argument(
        option,
        choices=PRECISIONS,
        default=default,
        metavar="PRECISION",
        help=f"of the weights: {', '.join(PRECISIONS)} ({default or 'full precision'}); "
        "int8-dynamic also rounds the inputs of the layers",
    )


def run_quantize(args: argparse.Namespace) -> int:
    if any((args.out / name).exists() for name in NAMES) and not cut_short(args.out):
        raise UsageError(f"{args.out} already contains a model; choose a different --out")
    try:
        model = load_model(args.model, quantize=args.precision, group=args.group)
        model.save_pretrained(args.out)
    except (SettingsError, ImportError) as error:
        raise UsageError(error) from None
    size = (args.out / WEIGHTS).stat().st_size
    print(f"{args.out}: {args.precision}, {size / 1e6:,.1f} MB")
    return 0
