"""A run's progress: a bar or lines on stderr, log.csv, and a plot of the losses."""

from __future__ import annotations

import csv
import datetime
import io
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from fastgpt.atomic_files import regular, whole_file
from fastgpt.training.settings import SettingsError

LOG, PICTURE = "log.csv", "loss.png"
DRAW_EVERY = 30.0  # seconds
SAY_EVERY = 10.0  # seconds, if there is no bar


class Step(NamedTuple):
    """The results of one step: a row of the log."""

    step: int  # counted from 1
    tokens: int  # trained on so far
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    share_of_peak: float | None  # of what speed.peak measures; None if it can't
    memory_bytes: int  # this process's peak so far
    validation_loss: float | None


class Report:
    """Reports nothing: for every process but the first."""

    shown = False

    def start(self, step: int, steps: int, line: str) -> None:
        """Training starts after this step; the line describes the run."""

    def step(self, row: Step, steps: int) -> None:
        """A step is done."""

    def sample(self, text: str) -> None:
        """The model generated this text."""

    def saved(self, step: int) -> None:
        """The checkpoint of this step is saved."""

    def reading(self, done: int, total: int) -> None:
        """This many bytes of the texts have been tokenised."""

    def end(self, step: int, finished: bool) -> None:
        """Training has finished its last step, or was stopped."""

    def close(self) -> None:
        """The run is over."""


class Console(Report):
    """Reports on stderr, with a bar if rich is installed and it is a terminal, and in the log."""

    shown = True

    def __init__(self, out: Path, stream: TextIO | None = None) -> None:
        self.out, self.stream = out, stream or sys.stderr
        self._log: TextIO | None = None
        self._bar, self._task = _rich_bar(self.stream)
        self._seconds_a_token: float | None = None
        self._drawn, self._said = time.monotonic(), -math.inf

    def start(self, step: int, steps: int, line: str) -> None:
        self._say(line)
        if step >= steps:
            self._say(f"step {step} of {steps} is already done: --steps N trains longer")
        self._log = open_log(self.out / LOG, step)
        if self._bar is not None:
            self._bar.update(self._task, total=steps, completed=step, description="")

    def step(self, row: Step, steps: int) -> None:
        self._write(row)
        left = self._time_left(row, steps)
        line = _line(row, left)
        if self._bar is not None:  # which has no room for the validation loss
            shown = _line(row._replace(validation_loss=None), left)
            self._bar.update(self._task, completed=row.step, description=shown)
        silent = time.monotonic() - self._said > SAY_EVERY
        if row.validation_loss is not None or (self._bar is None and silent):
            self._say(f"step {row.step}/{steps}  {line}")
            self._said = time.monotonic()

    def sample(self, text: str) -> None:
        self._say("  " + " ".join(text.split()))

    def saved(self, step: int) -> None:
        self._say(f"saved step {step}")
        if time.monotonic() - self._drawn > DRAW_EVERY:
            draw(self.out / LOG, self.out / PICTURE)
            self._drawn = time.monotonic()

    def reading(self, done: int, total: int) -> None:
        if self._bar is not None:
            share = f"reading the text: {done / 1e6:.0f} of {total / 1e6:.0f} MB"
            self._bar.update(self._task, total=total, completed=done, description=share)

    def end(self, step: int, finished: bool) -> None:
        if not finished:
            self._say(f"stopped at step {step}; --resume continues from there")
        if not draw(self.out / LOG, self.out / PICTURE):
            self._say(f"no {PICTURE}, because matplotlib is missing: pip install matplotlib")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._log is not None:
            self._log.close()

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, file=self.stream, flush=True)

    def _write(self, row: Step) -> None:
        if self._log is None:
            return
        writer = csv.writer(self._log)
        if self._log.tell() == 0:
            writer.writerow(row._fields)
        writer.writerow(["" if value is None else value for value in row])
        self._log.flush()

    def _time_left(self, row: Step, steps: int) -> float:
        """Seconds to the last step, by an exponential moving average of the speed."""
        seconds = 1 / row.tokens_per_second
        old = self._seconds_a_token
        self._seconds_a_token = seconds if old is None else 0.9 * old + 0.1 * seconds
        return self._seconds_a_token * row.tokens / row.step * (steps - row.step)


def open_log(path: Path, step: int) -> TextIO:
    """The log, opened for appending after the row of this step; later rows are removed."""
    kept = read_log(path, step)
    if kept:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(kept[0]))
        writer.writeheader()
        writer.writerows(kept)
        with whole_file(path) as file:
            file.write(text.getvalue().encode())
    else:
        path.unlink(missing_ok=True)
    return path.open("a", newline="")


def read_log(path: Path, last: int | None = None) -> list[dict[str, str]]:
    """The log's complete rows, as dictionaries by column, up to a step.

    Raises:
        SettingsError: it is not such a log.
    """
    if not path.exists():
        return []
    try:
        with regular(path).open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
        for row in rows:
            if set(row) != set(Step._fields):
                raise ValueError(f"its columns are {', '.join(map(str, row))}")
            float(row["loss"]), float(row["validation_loss"] or 0)
        return [row for row in rows if last is None or int(row["step"]) <= last]
    except (OSError, ValueError, csv.Error) as error:
        raise SettingsError(
            f"{path} is broken: {error}; the run goes on without it if you remove it"
        ) from None


def draw(log: Path, picture: Path) -> bool:
    """Plots the losses over the steps; returns False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = read_log(log)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name, label, marker in (("loss", "training", ""), ("validation_loss", "validation", "o")):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        steps, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, values, marker=marker, label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(picture) as file:
        figure.savefig(file, format="png")
    return True


def _line(row: Step, left: float) -> str:
    parts = [f"loss {row.loss:.3f}"]
    if row.validation_loss is not None:
        parts.append(f"validation {row.validation_loss:.3f}")
    share = "-" if row.share_of_peak is None else f"{row.share_of_peak:.0%}"
    parts += [f"{row.tokens_per_second:,.0f} tokens/s", f"{share} of peak"]
    if row.memory_bytes:
        parts.append(f"{row.memory_bytes / 2**30:.2f} GiB")
    parts.append(f"{datetime.timedelta(seconds=round(left))} left")
    return ", ".join(parts)


def _rich_bar(stream: TextIO) -> tuple[Any, Any]:
    """A running bar and its task; None if rich is missing or the stream is not a terminal."""
    if not stream.isatty():
        return None, None
    try:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        return None, None
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns, console=RichConsole(file=stream))
    bar.start()
    return bar, bar.add_task("", total=None)
