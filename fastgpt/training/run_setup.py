"""What a run begins with: its settings, tokens and model, anew or where it left off."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch

from fastgpt.bench.machine import machine_line
from fastgpt.model.gpt import GPTModel
from fastgpt.tokenizer import gpt2_encoding
from fastgpt.training import checkpoint
from fastgpt.training.data import Windows
from fastgpt.training.memory import check_memory
from fastgpt.training.model_files import load_model
from fastgpt.training.parallel import Group
from fastgpt.training.report import Console, Report
from fastgpt.training.settings import Settings, SettingsError, read_config
from fastgpt.training.speed import peak_is
from fastgpt.training.tokens import TokenFile, open_tokens, text_files, tokenise
from fastgpt.training.trainer import Trainer, sample_ids, takes_bfloat16
from fastgpt.weights.save import CONFIG

# What decides the windows of each step can't change on the way.
FIXED = ("batch", "seed", "validation")
TOKENS = "tokens"


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for; None where nothing was said."""

    out: Path
    text: list[str]
    config: str | None = None  # a size's name or a JSON file
    context: int | None = None
    start: str | None = None  # a model whose weights to start from
    resume: bool = False
    epochs: float | None = None
    tokens: Path | None = None  # the folder of token files
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # of Settings, those given


def train(request: Request, group: Group) -> bool:
    """Trains as asked, in each process of the group; returns whether it came to the last step.

    Raises:
        TextError, SettingsError: it can't be done as asked; at most token files were made.
        EncodingError: tiktoken's table isn't to be had.
        Diverged, PeersLost: it broke off.
    """
    report = Console(request.out) if group.rank == 0 else Report()
    held = contextlib.ExitStack()
    try:
        run = group.first(lambda: _prepared(request, group, report, held))
        settings = Settings(**run["settings"])
        last = None if run["resume"] is None else Path(run["resume"])
        tokens, context = _tokens(Path(run["tokens"])).ids(), run["config"]["context_length"]
        windows = Windows(tokens, context, settings.validation, settings.seed)
        model = _model(run, last, settings.seed)
        encoding = gpt2_encoding() if settings.sample is not None else None
        trainer = Trainer(model, windows, settings, request.out, group, report, encoding, last)
        report.start(trainer.step, settings.steps, _headline(settings, model, windows, group))
        finished = trainer.run()
        report.end(trainer.step, finished)
        return finished
    finally:
        held.close()
        report.close()


def _prepared(
    args: Request, group: Group, report: Report, held: contextlib.ExitStack
) -> dict[str, Any]:
    """What all processes need to know: run.json, and the checkpoint to go on from."""
    before = checkpoint.read_run(args.out)
    saved = checkpoint.checkpoints(args.out)
    last = saved[-1] if saved else None
    if before is None and (args.out / CONFIG).exists():
        raise SettingsError(f"{args.out} holds a model of another making: take another --out")
    if before is not None and last is not None and not args.resume:
        raise SettingsError(
            f"{args.out} holds a run at step {checkpoint.load_step(last)}: go on with it by "
            "--resume, or start another in another --out"
        )
    if not args.resume:
        before = None  # a run that ended before its first checkpoint starts anew
    settings = _settings(args, before)
    draft = Settings(**{"steps": 1} | settings)
    if draft.batch % group.size:
        raise SettingsError(
            f"a batch of {draft.batch} can't be shared evenly among {group.size} processes"
        )
    run: dict[str, Any] = {"start": _start(args, before), "config": _config(args, before)}
    check_memory(
        run["config"],
        min(draft.micro_batch or draft.batch, draft.batch // group.size),
        group.device,
        bfloat16=takes_bfloat16(draft.precision, group.device),
        tied=run["start"] is not None,
        shards=group.size if group.sharded else 1,
        beside=1 if group.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    if draft.sample is not None:
        largest = max(sample_ids(draft.sample, gpt2_encoding()))
        _check_token("sample", largest, run["config"])
    tokens = _read_text(args, before, run["config"], report)
    run |= {"tokens": str(tokens.path.resolve()), "digest": tokens.digest}
    # Raises where the text is too short, before anything is written.
    windows = Windows(tokens.ids(), run["config"]["context_length"], draft.validation, draft.seed)
    if "steps" not in settings or (args.epochs is not None and "steps" not in args.settings):
        epochs = 1 if args.epochs is None else args.epochs
        settings["steps"] = math.ceil(windows.train_size * epochs / draft.batch)
    run["settings"] = dataclasses.asdict(Settings(**settings))
    held.enter_context(checkpoint.claimed(args.out))
    checkpoint.write_run(args.out, run)
    return run | {"resume": None if last is None else str(last)}


def _start(args: Request, before: dict[str, Any] | None) -> str | None:
    """The model whose weights the run started from: a path, or a name on the hub."""
    start = args.start
    if start is not None and os.path.exists(start):
        start = os.path.abspath(start)
    if before is None:
        return start
    if start is not None and start != before["start"]:
        raise SettingsError(f"{args.out} holds a run with another --from")
    began: str | None = before["start"]
    return began


def _config(args: Request, before: dict[str, Any] | None) -> dict[str, Any]:
    if before is None and args.start is not None:
        if args.config is not None or args.context is not None:
            raise SettingsError("--from brings its own --config and --context")
        return dict(load_model(args.start).cfg)
    if before is not None and args.config is None:
        config: dict[str, Any] = dict(before["config"])
    else:
        config = read_config(args.config or "124M")
    if args.context is not None:
        config["context_length"] = args.context
    if before is not None and config != before["config"]:
        raise SettingsError(f"{args.out} holds a run of another --config or --context")
    return config


def _read_text(
    args: Request,
    before: dict[str, Any] | None,
    config: dict[str, Any],
    report: Report,
) -> TokenFile:
    if args.text:
        folder = args.tokens or args.out / TOKENS
        tokens = tokenise(text_files(args.text), folder, gpt2_encoding(), report.reading)
    elif before is None:
        missing = f"{args.out} has no checkpoint to go on from: " if args.resume else ""
        raise SettingsError(f"{missing}give the texts to train on")
    else:
        made = Path(before["tokens"])
        tokens = _tokens(made, args.out / TOKENS / made.name)  # the folder may have been moved
    if before is not None and tokens.digest != before["digest"]:
        raise SettingsError(f"{args.out} holds a run on another text")
    _check_token("text", tokens.largest, config)
    return tokens


def _check_token(what: str, largest: int, config: dict[str, Any]) -> None:
    if largest >= config["vocab_size"]:
        raise SettingsError(
            f"the {what} has token {largest}, the model a vocabulary of {config['vocab_size']}"
        )


def _tokens(*places: Path) -> TokenFile:
    """The token file at the first of these places that has it."""
    for tokens in map(open_tokens, places):
        if tokens is not None:
            return tokens
    raise SettingsError(f"the token file {places[0]} is gone: give the texts again")


def _settings(args: Request, before: dict[str, Any] | None) -> dict[str, Any]:
    """What is given, else the run's own."""
    given = args.settings
    settings: dict[str, Any] = {} if before is None else dict(before["settings"])
    for name in FIXED:
        if name in given and given[name] != settings.get(name, given[name]):
            raise SettingsError(
                f"--{name} {given[name]} is not that of the run in {args.out}, {settings[name]}"
            )
    settings |= given
    if "lr" in given and "min_lr" not in given:
        settings["min_lr"] = given["lr"] / 10
    return settings


def _model(run: dict[str, Any], last: Path | None, seed: int) -> GPTModel:
    if last is not None:
        return load_model(last)
    if run["start"] is not None:
        return load_model(run["start"])
    torch.manual_seed(seed)
    return GPTModel(run["config"])


def _headline(settings: Settings, model: GPTModel, windows: Windows, group: Group) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    epoch = windows.train_size / settings.batch
    where = f"{group.size} processes, {group.device.type}" if group.size > 1 else group.device.type
    return (
        f"{parameters:,} parameters, context {windows.context}, an epoch is {epoch:,.1f} steps; "
        f"{where}, {machine_line()}; the peak is that of {peak_is(group.device)}"
    )
