"""`fastgpt train`: a text, a size and a folder in, a model out; alone or under torchrun."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

import torch

from fastgpt.cli.usage import (
    Commands,
    Failure,
    UsageError,
    number,
    out_of_memory,
    positive,
    seed,
    text,
    threads,
)
from fastgpt.tokenizer import EncodingError
from fastgpt.training.settings import CONFIGS, Settings, SettingsError
from fastgpt.training.tokens import TextError

NAMES = [field.name for field in dataclasses.fields(Settings)]


def add_to(commands: Commands) -> None:
    sub = commands.add_parser(
        "train",
        help="train a model on texts",
        description="Train a model on UTF-8 texts. DIR receives the model, checkpoints, log.csv "
        "and loss.png. Ctrl-C saves and stops; --resume goes on from the last checkpoint. "
        "Under torchrun the processes share each batch.",
    )
    sub.add_argument("text", nargs="*", metavar="TEXT", help="a file, or a folder of .txt files")
    sub.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the run's folder, made if need be"
    )
    sub.add_argument("--config", metavar="SIZE", help=f"{', '.join(CONFIGS)} or a JSON file (124M)")
    sub.add_argument("--context", type=positive, metavar="N", help="in place of the config's")
    sub.add_argument(
        "--from",
        dest="start",
        metavar="MODEL",
        help="start from its weights: gpt2, a folder",
    )
    sub.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    sub.add_argument("--epochs", type=number(0), metavar="N", help="passes over the text (1)")
    _add_settings(sub)
    sub.add_argument("--tokens", type=Path, metavar="DIR", help="for token files (OUT/tokens)")
    sub.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="(%(default)s)"
    )
    sub.add_argument("--threads", type=threads, metavar="N", help="default: as many as torch uses")
    sub.add_argument("--fsdp", action="store_true", help="shard by FSDP2 rather than copy by DDP")
    sub.add_argument(
        "--timeout",
        type=number(1),
        default=600,
        metavar="SECONDS",
        help="without an answer, after which other processes are given up (%(default)s)",
    )
    sub.set_defaults(run=run_train)


def _add_settings(sub: argparse.ArgumentParser) -> None:
    """An option for each of Settings; one that isn't given stays out of the namespace."""
    texts = {
        "steps": (positive, "updates of the weights, instead of --epochs"),
        "batch": (positive, "windows of a step, on all processes together"),
        "micro_batch": (positive, "windows that a process takes at once (its whole share)"),
        "lr": (number(0), "the largest learning rate"),
        "min_lr": (number(0), "the last learning rate (a tenth of --lr)"),
        "warmup": (int, "steps to come to --lr (a tenth of all, at most 100)"),
        "weight_decay": (number(0), "of matrices"),
        "clip": (number(0), "the largest norm of the gradients, 0 for none"),
        "precision": (str, "float32, bfloat16, or auto: bfloat16 on GPUs"),
        "seed": (seed, "of weights, order and dropout"),
        "validation": (number(0, 1), "the share of the text that is not trained on"),
        "eval_every": (positive, "steps between evaluations"),
        "eval_batches": (positive, "batches of an evaluation"),
        "checkpoint_every": (positive, "steps between checkpoints"),
        "keep": (positive, "checkpoints to keep"),
        "sample": (text, "what a sample after each evaluation goes on from"),
        "sample_tokens": (positive, "tokens of a sample"),
    }
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    for name, (kind, told) in texts.items():
        default = defaults[name]
        silent = default is dataclasses.MISSING or default is None or name == "min_lr"
        sub.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,  # type: ignore[arg-type]
            default=argparse.SUPPRESS,
            metavar="TEXT" if kind in (str, text) else "N",
            help=told if silent else f"{told} ({default})",
        )


def run_train(args: argparse.Namespace) -> int:
    try:
        from fastgpt.training import checkpoint, parallel, start, trainer
    except ModuleNotFoundError as error:
        raise UsageError(
            f"training needs {error.name}: pip install matplotlib numpy rich safetensors"
        ) from None
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in NAMES if hasattr(args, name)}
    names = ("out", "text", "config", "context", "start", "resume", "epochs", "tokens")
    request = start.Request(**{name: getattr(args, name) for name in names}, settings=given)
    try:
        with parallel.join(args.device, args.fsdp, args.timeout) as group:
            finished = start.train(request, group)
        return 0 if finished else 130
    except parallel.SaidElsewhere:
        return 2
    except (TextError, SettingsError, EncodingError) as error:
        raise UsageError(error) from None
    except BrokenPipeError:
        raise
    except parallel.PeersLost as error:
        message = _with_way_on(checkpoint.checkpoints(args.out), error)
        print(f"fastgpt train: {message}", file=sys.stderr, flush=True)
        os._exit(1)  # an ordinary exit would wait for what is left of the group
    except (OSError, MemoryError, RuntimeError) as error:
        expected = isinstance(error, (trainer.Diverged, OSError)) or out_of_memory(error)
        if not expected:
            raise
        raise Failure(_with_way_on(checkpoint.checkpoints(args.out), error)) from None


def _with_way_on(saved: list[Path], error: Exception) -> str:
    if not saved:
        return f"{error}; there is no checkpoint yet"
    return f"{error}; {saved[-1].name} is saved, --resume goes on from it"
