"""The training loop: its losses don't depend on interruptions or on the number of processes."""

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
from fastgpt.ops.id_check import raise_wrong_ids
from fastgpt.ops.later import Later
from fastgpt.tokenizer import END_OF_TEXT, decoded
from fastgpt.training import checkpoint
from fastgpt.training.data import Windows, derived_seed, to_device
from fastgpt.training.parallel import Group, gathered
from fastgpt.training.report import Report, Step
from fastgpt.training.settings import Settings
from fastgpt.training.speed import flops_per_token, memory_used, peak


class Diverged(RuntimeError):
    """The loss or the gradients became NaN or infinite."""


class _Unread(NamedTuple):
    """A step whose numbers nobody has read."""

    step: int  # counted from 1
    lr: float
    sums: Tensor  # on the device
    numbers: Later  # the loss, how many processes were told to stop, and the gradients' norm

    def check(self) -> tuple[float, float, float]:
        """Reads them, once the device has come to them.

        Raises:
            Diverged: the loss or the norm is NaN or infinite.
            IndexError: because an id is outside the vocabulary.
        """
        loss, stops, norm = self.numbers.read()
        raise_wrong_ids(self.sums, wait=False)
        for name, value in (("loss", loss), ("gradients' norm", norm)):
            if not math.isfinite(value):
                raise Diverged(f"the {name} is {value} at step {self.step}: try a smaller --lr")
        return loss, stops, norm


class Trainer:
    """Trains a model on a text's windows, with checkpoints in a folder.

    Args:
        model: on the CPU or the group's device, the same in every process.
        windows: of the text.
        settings: how to train.
        out: the run's folder, which has a ``run.json``.
        group: from ``join``.
        report: is told of every step.
        encoding: for the samples; None: no samples.
        resume: a checkpoint of this folder to continue from.

    Raises:
        SettingsError: the batch can't be divided among the processes, or the checkpoint is broken.
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
        self.local = group.share(settings.batch)
        self.model, self.windows, self.settings = model.to(group.device), windows, settings
        self.out, self.group, self.report, self.encoding = out, group, report, encoding
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
        if resume is not None and self.step > 0:  # at step 0 the optimiser has no state
            checkpoint.load_optimizer(resume, self.model, self.optimizer, group)
        # The checkpoint restored the old settings; restore the current ones.
        for param_group, decay in zip(
            self.optimizer.param_groups, (settings.weight_decay, 0.0), strict=True
        ):
            param_group.update(lr=settings.lr, initial_lr=settings.lr, weight_decay=decay)
        self.schedule = LambdaLR(
            self.optimizer, lambda step: lr_factor(settings, step), last_epoch=self.step - 1
        )
        self._stop = threading.Event()
        self._unread: _Unread | None = None
        self._since = 0.0  # when the last step's numbers were read

    def run(self) -> bool:
        """Trains until the last step or a signal; returns whether the last step was reached.

        SIGINT and SIGTERM stop it after the current step, with a checkpoint; a second SIGINT stops
        it at once.

        Raises:
            Diverged: the loss or the gradients became NaN or infinite; the last checkpoint stays.
            PeersLost: another process of the run was lost (raised by ``join``).
        """
        self.peak = float(self.group.sum(peak(self.group.device, self.autocast)))
        devices = [self.group.device] if self.group.device.type == "cuda" else []
        with _signals(self._stop), torch.random.fork_rng(devices):
            self.model.train()
            stopped = False
            while self.step < self.settings.steps and not stopped:
                rows, stopped = self._one_step()
                for row in rows:
                    self.report.step(row, self.settings.steps)
                if self.step % self.settings.checkpoint_every == 0 or stopped:
                    self._save()
            if self._saved != self.step:
                self._save()
        return self.step >= self.settings.steps

    def evaluate(self) -> float:
        """The mean loss over an evaluation's validation windows; leaves the model in train mode."""
        settings, group = self.settings, self.group
        numbers = self.windows.validation_sample(settings.eval_batches * settings.batch)
        total = torch.zeros((), device=group.device)
        self.model.eval()
        with torch.no_grad(), self.autocast:
            for first in range(0, len(numbers), group.size * self.micro):
                mine = numbers[first + group.rank * self.micro :][: self.micro]
                # FSDP gathers weights in each pass, so a process without windows runs one too.
                idx, targets = self._to_device(self.windows.validation(mine or numbers[:1]))
                total += self.model.loss(idx, targets) * len(mine)
        group.reshard(self.model)
        self.model.train()
        return float(group.sum(total)) / len(numbers)

    def _one_step(self) -> tuple[list[Step], bool]:
        """Trains one step; returns the rows of those whose numbers are read by now, and whether to
        stop. A GPU's are read once it has the next step to do, unless something waits for them.

        Raises:
            Diverged: as ``run``, where no checkpoint holds what followed.
            IndexError: an id of the text is outside the vocabulary.
        """
        if self._unread is None:
            self._since = time.perf_counter()
        loss = self._gradients()
        sums = self.group.sum(loss / self.group.size, float(self._stop.is_set()))
        limit = self.settings.clip or math.inf
        norm = gathered(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        numbers = Later(torch.cat((sums, norm.detach()[None])))
        lr = float(self.schedule.get_last_lr()[0])
        due, last = self._unread, _Unread(self.step + 1, lr, sums, numbers)
        if not loss.is_cuda:
            last.check()  # before the weights become NaN
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step += 1
        rows, stops, self._unread = [], False, last
        evaluates = self.step % self.settings.eval_every == 0 or self.step == self.settings.steps
        saves = self.step % self.settings.checkpoint_every == 0
        if due is not None:
            rows.append(self._row(due, False))
            stops = due.check()[1] > 0
        if not loss.is_cuda or evaluates or saves or stops:
            self._unread = None
            rows.append(self._row(last, evaluates))
            stops = stops or last.check()[1] > 0
        return rows, stops

    def _row(self, read: _Unread, evaluates: bool) -> Step:
        """The step's row; evaluates the model first if asked to."""
        loss, _, norm = read.check()
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        validation = None
        if evaluates:
            validation = self.evaluate()
            self._sample()
        tokens = self.settings.batch * self.windows.context
        return Step(
            step=read.step,
            tokens=read.step * tokens,
            loss=loss,
            lr=read.lr,
            grad_norm=norm,
            tokens_per_second=tokens / seconds,
            share_of_peak=None
            if math.isnan(self.peak)
            else tokens * self.flops / seconds / self.peak,
            memory_bytes=memory_used(self.group.device),
            validation_loss=validation,
        )

    def _gradients(self) -> Tensor:
        """Accumulates the gradients of this process's windows; returns their mean loss."""
        first = self.step * self.settings.batch + self.group.rank * self.local
        total = torch.zeros((), device=self.group.device)
        for begin in range(0, self.local, self.micro):
            count = min(self.micro, self.local - begin)
            idx, targets = self._to_device(self.windows.train(first + begin, count))
            # Dropout depends on the windows alone, not on earlier random numbers.
            torch.manual_seed(derived_seed(self.settings.seed, first + begin))
            last = begin + count == self.local
            with self.group.accumulating(self.model, self.loss_of, last):
                with self.autocast:
                    loss = self.loss_of(idx, targets) * (count / self.local)
                loss.backward()
            total += loss.detach()
        return total

    def _to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return to_device(batch[0], self.group.device), to_device(batch[1], self.group.device)

    def _sample(self) -> None:
        text = self.settings.sample
        if text is None or self.encoding is None or not (self.group.sharded or self.report.shown):
            return
        idx = torch.tensor([sample_ids(text, self.encoding)])
        self.model.eval()
        # If the model is sharded, every process takes part.
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
    """The prompt of a sample as token ids; an empty one is <|endoftext|>."""
    ids: list[int] = encoding.encode(text or END_OF_TEXT, allowed_special="all")
    return ids


def lr_factor(settings: Settings, step: int) -> float:
    """The share of lr at a step (from 0): up linearly, then down along a cosine."""
    warmup = settings.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    along = min(1.0, (step - warmup) / max(1, settings.steps - 1 - warmup))
    least = settings.min_lr / settings.lr if settings.lr else 0.0
    return least + (1 - least) * (1 + math.cos(math.pi * along)) / 2


def _optimizer(model: GPTModel, settings: Settings, group: Group) -> torch.optim.AdamW:
    """AdamW that decays matrices only, fused if PyTorch has that for the device."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    for param_group in groups:
        param_group["initial_lr"] = settings.lr  # a checkpoint's groups have it, and must match
    fused = group.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=fused)


def takes_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether a run of this precision autocasts to bfloat16."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16"


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set the event; a second SIGINT raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
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
