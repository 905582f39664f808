"""Sets up a run, new or resumed: its settings, tokens and model."""

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
from fastgpt.training.parallel import Group
from fastgpt.training.report import Console, Report
from fastgpt.training.settings import (
    Settings,
    SettingsError,
    check_token,
    check_trainable,
    load_model,
    read_config,
)
from fastgpt.training.speed import peak_is
from fastgpt.training.tokens import TokenFile, open_tokens, text_files, tokenise
from fastgpt.training.trainer import Trainer, sample_ids, takes_bfloat16
from fastgpt.weights.save import CONFIG

# These decide the windows of each step, so they can't change during a run.
FIXED = ("batch", "seed", "validation")
TOKENS = "tokens"


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for; None means not given."""

    out: Path
    text: list[str]
    config: str | None = None  # a size's name or a JSON file
    context: int | None = None
    start: str | None = None  # the model to take initial weights from
    resume: bool = False
    epochs: float | None = None
    tokens: Path | None = None  # the folder for token files
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # given fields of Settings


def train(request: Request, group: Group) -> bool:
    """Trains, in each process of the group; returns whether the last step was reached.

    Raises:
        TextError, SettingsError: the request can't be met; at most token files were written.
        EncodingError: tiktoken's table is not available.
        Diverged, PeersLost: the run broke off.
    """
    report = Console(request.out) if group.rank == 0 else Report()
    lock = contextlib.ExitStack()
    try:
        run, saved = group.on_rank0(lambda: _prepared(request, group, report, lock))
        settings = Settings(**run["settings"])
        last = None if saved is None else Path(saved)
        tokens, context = _tokens(Path(run["tokens"])).ids(), run["config"]["context_length"]
        windows = Windows(tokens, context, settings.validation, settings.seed)
        model = _model(run, last, settings.seed)
        encoding = gpt2_encoding() if settings.sample is not None else None
        trainer = Trainer(model, windows, settings, request.out, group, report, encoding, last)
        headline = _headline(settings, model, windows, group)

        def begin() -> None:  # once every file has turned out to be sound
            report.start(trainer.step, settings.steps, headline)
            checkpoint.write_run(request.out, run)

        group.on_rank0(begin)
        finished = trainer.run()
        report.end(trainer.step, finished)
        return finished
    finally:
        lock.close()
        report.close()


def _prepared(
    args: Request, group: Group, report: Report, lock: contextlib.ExitStack
) -> tuple[dict[str, Any], str | None]:
    """What all processes need: run.json's content to be, and the checkpoint to continue from."""
    before = checkpoint.read_run(args.out)
    saved = checkpoint.checkpoints(args.out)
    last = saved[-1] if saved else None
    if before is None and (args.out / CONFIG).exists():
        raise SettingsError(
            f"{args.out} already contains a model from another run; choose a different --out"
        )
    if before is not None and last is not None and not args.resume:
        raise SettingsError(
            f"{args.out} already contains a run at step {checkpoint.load_step(last)}: continue it "
            "with --resume, or choose a different --out"
        )
    if not args.resume:
        before = None  # a run without a checkpoint starts again
    settings = _settings(args, before)
    draft = Settings(**{"steps": 1} | settings)
    local = group.share(draft.batch)
    run: dict[str, Any] = {"start": _start(args, before), "config": _config(args, before)}
    check_memory(
        run["config"],
        min(draft.micro_batch or local, local),
        group.device,
        bfloat16=takes_bfloat16(draft.precision, group.device),
        tied=run["start"] is not None,
        shards=group.size if group.sharded else 1,
        beside=1 if group.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    if draft.sample is not None:
        largest = max(sample_ids(draft.sample, gpt2_encoding()))
        check_token("the sample", largest, run["config"])
    tokens = _read_text(args, before, run["config"], report)
    run |= {"tokens": str(tokens.path.resolve()), "digest": tokens.digest}
    # Raises if the text is too short, before anything is written.
    windows = Windows(tokens.ids(), run["config"]["context_length"], draft.validation, draft.seed)
    if "steps" not in settings or (args.epochs is not None and "steps" not in args.settings):
        epochs = 1 if args.epochs is None else args.epochs
        settings["steps"] = math.ceil(windows.train_size * epochs / draft.batch)
    run["settings"] = dataclasses.asdict(Settings(**settings))
    lock.enter_context(checkpoint.claimed(args.out))
    return run, None if last is None else str(last)


def _start(args: Request, before: dict[str, Any] | None) -> str | None:
    """The model that the run takes its initial weights from: a path, or a name on the Hub."""
    start = args.start
    if start is not None and os.path.exists(start):
        start = os.path.abspath(start)
    if before is None:
        return start
    if start is not None and start != before["start"]:
        raise SettingsError(f"the run in {args.out} has a different --from")
    began: str | None = before["start"]
    return began


def _config(args: Request, before: dict[str, Any] | None) -> dict[str, Any]:
    if before is None and args.start is not None:
        if args.config is not None or args.context is not None:
            raise SettingsError("--from has its own config: leave out --config and --context")
        model = load_model(args.start)
        check_trainable(model)
        return dict(model.cfg)
    if before is not None and args.config is None:
        config: dict[str, Any] = dict(before["config"])
    else:
        config = read_config(args.config or "124M")
    if args.context is not None:
        config["context_length"] = args.context
    if before is not None and config != before["config"]:
        raise SettingsError(f"the run in {args.out} has a different --config or --context")
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
        missing = f"{args.out} has no checkpoint to resume from: " if args.resume else ""
        raise SettingsError(f"{missing}give the texts to train on")
    else:
        made = Path(before["tokens"])
        tokens = _tokens(made, args.out / TOKENS / made.name)  # the folder may have been moved
    if before is not None and tokens.digest != before["digest"]:
        raise SettingsError(f"the run in {args.out} is on a different text")
    check_token("the text", tokens.largest, config)
    return tokens


def _tokens(*places: Path) -> TokenFile:
    """The token file at the first of these places that has one."""
    for tokens in map(open_tokens, places):
        if tokens is not None:
            return tokens
    raise SettingsError(f"the token file {places[0]} is missing or damaged: give the texts again")


def _settings(args: Request, before: dict[str, Any] | None) -> dict[str, Any]:
    """The settings given, and for the rest those of the earlier run."""
    given = args.settings
    settings: dict[str, Any] = {} if before is None else dict(before["settings"])
    for name in FIXED:
        if name in given and given[name] != settings.get(name, given[name]):
            raise SettingsError(
                f"--{name} is {given[name]}, but the run in {args.out} has {settings[name]}"
            )
    settings |= given
    if "lr" in given and "min_lr" not in given:
        settings["min_lr"] = given["lr"] / 10
    return settings


def _model(run: dict[str, Any], last: Path | None, seed: int) -> GPTModel:
    start = last or run["start"]
    if start is not None:
        return load_model(start)
    torch.manual_seed(seed)
    return GPTModel(run["config"])


def _headline(settings: Settings, model: GPTModel, windows: Windows, group: Group) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    epoch = windows.train_size / settings.batch
    where = f"{group.size} processes, {group.device.type}" if group.size > 1 else group.device.type
    return (
        f"{parameters:,} parameters, context {windows.context}, {epoch:,.1f} steps per epoch; "
        f"{where}, {machine_line()}; peak: {peak_is(group.device)}"
    )
