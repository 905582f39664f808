"""The training loop: the same losses however often it is stopped, and on however many processes."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fastgpt.model.generation import generate_text_simple
from fastgpt.model.gpt import GPTModel
from fastgpt.text_stream import decoded
from fastgpt.tokenizer import END_OF_TEXT
from fastgpt.training import checkpoint
from fastgpt.training.data import Windows, mix
from fastgpt.training.parallel import Group, whole
from fastgpt.training.report import Report
from fastgpt.training.settings import Settings, SettingsError
from fastgpt.training.speed import flops_per_token, memory_used, peak


class Diverged(RuntimeError):
    """The loss or the gradients are no longer numbers."""


class Step(NamedTuple):
    """What one step came to; a row of the log."""

    step: int  # counted from 1
    tokens: int  # trained on so far
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    share_of_peak: float | None  # of what speed.peak says; None where that can't be measured
    memory_bytes: int  # the most that this process held so far
    validation_loss: float | None


class Trainer:
    """Trains a model on a text's windows, with checkpoints in a folder.

    Args:
        model: on the CPU or the group's device; every process has the same.
        windows: of the text.
        settings: how to train.
        out: the folder; a run's first start wrote ``run.json`` there.
        group: of ``join``.
        report: told of every step by the first process.
        encoding: of the samples; None prints none.
        resume: a checkpoint of this folder to go on from.

    Raises:
        SettingsError: the batch can't be shared among the processes, or the checkpoint is broken.
    """

    def __init__(
        self,
        model: GPTModel,
        windows: Windows,
        settings: Settings,
        out: Path,
        group: Group,
        report: Report,
        encoding: Any = None,
        resume: Path | None = None,
    ) -> None:
        if settings.batch % group.size:
            raise SettingsError(
                f"a batch of {settings.batch} can't be shared evenly among {group.size} processes"
            )
        self.model, self.windows, self.settings = model.to(group.device), windows, settings
        self.out, self.group, self.report, self.encoding = out, group, report, encoding
        self.local = settings.batch // group.size
        self.micro = min(settings.micro_batch or self.local, self.local)
        self.autocast = torch.autocast(
            group.device.type,
            torch.bfloat16,
            enabled=takes_bfloat16(settings.precision, group.device),
        )
        self.flops = flops_per_token(model, windows.context)
        self.step = 0 if resume is None else checkpoint.load_step(resume)
        self.loss_of = group.wrap(self.model)
        self.optimizer = _optimizer(self.model, settings, group)
        self._saved = None if resume is None else self.step
        if resume is not None and self.step > 0:  # at step 0 it was saved as good as new, not new
            checkpoint.load_optimizer(resume, self.model, self.optimizer, group)
        # The checkpoint brought its own; these are to be had anew.
        for param_group, decay in zip(
            self.optimizer.param_groups, (settings.weight_decay, 0.0), strict=True
        ):
            param_group.update(lr=settings.lr, initial_lr=settings.lr, weight_decay=decay)
        self.schedule = LambdaLR(
            self.optimizer, lambda step: lr_factor(settings, step), last_epoch=self.step - 1
        )
        self._stop = threading.Event()

    def run(self) -> bool:
        """Trains to the last step, or until a signal; returns whether it came to the last.

        SIGINT and SIGTERM end it after the step they come in, with a checkpoint; a second SIGINT
        ends it at once.

        Raises:
            Diverged: the loss or the gradients became NaN or infinite. The last checkpoint stands.
            PeersLost: another process of the run was lost (raised by ``join``).
        """
        self.peak = self.group.sum(peak(self.group.device, self.autocast))[0]
        devices = [self.group.device] if self.group.device.type == "cuda" else []
        with _signals(self._stop), torch.random.fork_rng(devices):
            self.model.train()
            stopped = False
            while self.step < self.settings.steps and not stopped:
                row, stopped = self._one_step()
                self.report.step(row, self.settings.steps)
                if self.step % self.settings.checkpoint_every == 0 or stopped:
                    self._save()
            if self._saved != self.step:
                self._save()
        return self.step >= self.settings.steps

    def evaluate(self) -> float:
        """The mean loss over the validation windows of an evaluation; the model trains after it."""
        settings, group = self.settings, self.group
        numbers = self.windows.validation_sample(settings.eval_batches * settings.batch)
        total = torch.zeros((), device=group.device)
        self.model.eval()
        with torch.no_grad(), self.autocast:
            for first in range(0, len(numbers), group.size * self.micro):
                mine = numbers[first + group.rank * self.micro :][: self.micro]
                # FSDP gathers weights in each pass: a process without windows passes too.
                idx, targets = self._placed(self.windows.validation(mine or numbers[:1]))
                total += self.model.loss(idx, targets) * len(mine)
        group.reshard(self.model)
        self.model.train()
        return group.sum(total)[0] / len(numbers)

    def _one_step(self) -> tuple[Step, bool]:
        start = time.perf_counter()
        loss = self._gradients()
        value, stops = self.group.sum(loss / self.group.size, float(self._stop.is_set()))
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value} at step {self.step + 1}: try a smaller lr")
        limit = self.settings.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        grad_norm = float(whole(norm))
        if not math.isfinite(grad_norm):  # the weights would be no numbers, and be saved
            raise Diverged(
                f"the gradients' norm is {grad_norm} at step {self.step + 1}: try a smaller lr"
            )
        lr = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step += 1
        seconds = time.perf_counter() - start
        validation = None
        if self.step % self.settings.eval_every == 0 or self.step == self.settings.steps:
            validation = self.evaluate()
            self._sample()
        tokens = self.settings.batch * self.windows.context
        row = Step(
            step=self.step,
            tokens=self.step * tokens,
            loss=value,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=tokens / seconds,
            share_of_peak=None
            if math.isnan(self.peak)
            else tokens * self.flops / seconds / self.peak,
            memory_bytes=memory_used(self.group.device),
            validation_loss=validation,
        )
        return row, stops > 0

    def _gradients(self) -> Tensor:
        """Adds up the gradients of this process's windows; returns their mean loss."""
        first = self.step * self.settings.batch + self.group.rank * self.local
        total = torch.zeros((), device=self.group.device)
        for begin in range(0, self.local, self.micro):
            count = min(self.micro, self.local - begin)
            idx, targets = self._placed(self.windows.train(first + begin, count))
            # Dropout by the windows it falls on, not by what was drawn before.
            torch.manual_seed(mix(self.settings.seed, first + begin) >> 1)
            last = begin + count == self.local
            with self.group.accumulating(self.model, self.loss_of, last):
                with self.autocast:
                    loss = self.loss_of(idx, targets) * (count / self.local)
                loss.backward()
            total += loss.detach()
        return total

    def _placed(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self.group.device.type != "cuda":
            return batch[0].to(self.group.device), batch[1].to(self.group.device)
        idx, targets = (t.pin_memory().to(self.group.device, non_blocking=True) for t in batch)
        return idx, targets

    def _sample(self) -> None:
        text = self.settings.sample
        if text is None or self.encoding is None or not (self.group.sharded or self.report.shown):
            return
        idx = torch.tensor([sample_ids(text, self.encoding)])
        self.model.eval()
        # Sharded, every process takes part.
        with self.autocast:
            ids = generate_text_simple(
                self.model,
                idx.to(self.group.device),
                self.settings.sample_tokens,
                self.windows.context,
            )
        self.group.reshard(self.model)
        self.model.train()
        self.report.sample(decoded(self.encoding, ids[0].tolist()))

    def _save(self) -> None:
        checkpoint.save(
            self.out, self.step, self.model, self.optimizer, self.group, self.settings.keep
        )
        self._saved = self.step
        self.report.saved(self.step)


def sample_ids(text: str, encoding: Any) -> list[int]:
    """The ids that a sample goes on from; an empty text starts a new one."""
    ids: list[int] = encoding.encode(text or END_OF_TEXT, allowed_special="all")
    return ids


def lr_factor(settings: Settings, step: int) -> float:
    """The share of lr that the step after this many steps takes: up in a line, down in a cosine."""
    warmup = settings.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    along = min(1.0, (step - warmup) / max(1, settings.steps - 1 - warmup))
    least = settings.min_lr / settings.lr if settings.lr else 0.0
    return least + (1 - least) * (1 + math.cos(math.pi * along)) / 2


def _optimizer(model: GPTModel, settings: Settings, group: Group) -> torch.optim.AdamW:
    """AdamW that decays matrices only, fused where PyTorch has it fused."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    for param_group in groups:
        param_group["initial_lr"] = settings.lr  # as in a checkpoint's groups, which must match
    fused = group.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=fused)


def takes_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether a run of this precision autocasts to bfloat16."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16"


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set the event; the second SIGINT interrupts as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python takes signals in the main thread only
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
