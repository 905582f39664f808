"""`fastgpt train`: trains a model on texts, in one process or under torchrun."""

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
    add_device,
    number,
    out_of_memory,
    positive,
    seed,
    text,
)
from fastgpt.tokenizer import EncodingError
from fastgpt.training.settings import CONFIGS, Settings, SettingsError
from fastgpt.training.tokens import TextError

NAMES = [field.name for field in dataclasses.fields(Settings)]


def add_to(commands: Commands) -> None:
    sub = commands.add_parser(
        "train",
        help="train a model on texts",
        description="Train a model on UTF-8 texts. DIR will contain the model, checkpoints, "
        "log.csv and loss.png. Ctrl-C saves and stops; --resume continues from the last "
        "checkpoint. Under torchrun the processes share each batch.",
    )
    sub.add_argument("text", nargs="*", metavar="TEXT", help="a file, or a folder of .txt files")
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="the run's folder")
    sub.add_argument("--config", metavar="SIZE", help=f"{', '.join(CONFIGS)} or a JSON file (124M)")
    sub.add_argument("--context", type=positive, metavar="N", help="instead of the config's")
    sub.add_argument(
        "--from",
        dest="start",
        metavar="MODEL",
        help="start from these weights: gpt2, or a folder or file",
    )
    sub.add_argument("--resume", action="store_true", help="continue the run in DIR")
    sub.add_argument("--epochs", type=number(0), metavar="N", help="passes over the text (1)")
    _add_settings(sub)
    sub.add_argument("--tokens", type=Path, metavar="DIR", help="for token files (OUT/tokens)")
    add_device(sub)
    sub.add_argument("--fsdp", action="store_true", help="shard with FSDP2 instead of DDP")
    sub.add_argument(
        "--timeout",
        type=number(1),
        default=600,
        metavar="SECONDS",
        help="without an answer, after which other processes count as lost (%(default)s)",
    )
    sub.set_defaults(run=run_train)


def _add_settings(sub: argparse.ArgumentParser) -> None:
    """Adds an option for each field of Settings; one not given is absent from the namespace."""
    parsers = {"int": int, "float": number(), "str": text}
    for field in dataclasses.fields(Settings):
        kind, help_text = str(field.type).partition(" ")[0], field.metadata["help"]
        silent = field.default in (dataclasses.MISSING, None) or help_text.endswith(")")
        sub.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=seed if field.name == "seed" else parsers[kind],  # type: ignore[arg-type]
            default=argparse.SUPPRESS,
            metavar="TEXT" if kind == "str" else "N",
            help=help_text if silent else f"{help_text} ({field.default})",
        )


def run_train(args: argparse.Namespace) -> int:
    try:  # before a run begins that could not save itself
        import safetensors  # noqa: F401

        from fastgpt.training import checkpoint, parallel, run_setup, trainer
    except ModuleNotFoundError as error:
        raise UsageError(
            f"training needs {error.name}: pip install matplotlib numpy rich safetensors"
        ) from None
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in NAMES if hasattr(args, name)}
    names = ("out", "text", "config", "context", "start", "resume", "epochs", "tokens")
    request = run_setup.Request(**{name: getattr(args, name) for name in names}, settings=given)
    try:
        with parallel.join(args.device, args.fsdp, args.timeout) as group:
            finished = run_setup.train(request, group)
        return 0 if finished else 130
    except parallel.FailedOnRank0:
        return 2
    except (TextError, SettingsError, EncodingError) as error:
        raise UsageError(error) from None
    except BrokenPipeError:
        raise
    except parallel.PeersLost as error:
        message = _with_checkpoint(checkpoint.checkpoints(args.out), error)
        print(f"fastgpt train: {message}", file=sys.stderr, flush=True)
        os._exit(1)  # a normal exit would wait for the lost processes
    except (OSError, MemoryError, RuntimeError) as error:
        expected = isinstance(error, (trainer.Diverged, OSError)) or out_of_memory(error)
        if not expected:
            raise
        raise Failure(_with_checkpoint(checkpoint.checkpoints(args.out), error)) from None


def _with_checkpoint(saved: list[Path], error: Exception) -> str:
    if not saved:
        return f"{error}; there is no checkpoint yet"
    return f"{error}; --resume continues from {saved[-1].name}"
