"""What a run says as it goes: a bar or lines, log.csv, and a picture of the losses."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fastgpt.atomic_files import whole_file

if TYPE_CHECKING:
    from fastgpt.training.trainer import Step

LOG, PICTURE = "log.csv", "loss.png"
DRAW_EVERY = 30.0  # seconds
SAY_EVERY = 10.0  # seconds, where no bar moves


class Report:
    """Tells nobody: that of every process but the first."""

    shown = False

    def start(self, step: int, steps: int, line: str) -> None:
        """Training begins after this many steps; line says on what."""

    def step(self, row: Step, steps: int) -> None:
        """A step was done."""

    def sample(self, text: str) -> None:
        """The model wrote this."""

    def saved(self, step: int) -> None:
        """The checkpoint of a step is on the disk."""

    def reading(self, done: int, total: int) -> None:
        """So many bytes of the text were turned into tokens."""

    def end(self, step: int, finished: bool) -> None:
        """Training came to its last step, or was stopped."""

    def close(self) -> None:
        """Nothing more comes."""


class Console(Report):
    """Says it on stderr, by rich where that is installed and a person looks on, and logs it."""

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
            self._say(f"step {step} of {steps} is done: --steps N goes on to more")
        self._log = open_log(self.out / LOG, step)
        if self._bar is not None:
            self._bar.update(self._task, total=steps, completed=step, description="")

    def step(self, row: Step, steps: int) -> None:
        self._write(row)
        left = self._time_left(row, steps)
        line = _line(row, left)
        if self._bar is not None:  # which has no room for more than that
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
            self._say(f"stopped at step {step}; --resume goes on from there")
        if not draw(self.out / LOG, self.out / PICTURE):
            self._say(f"no {PICTURE}: that takes matplotlib, pip install matplotlib")

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
        """Seconds, by a mean over the last steps in which each weighs less than the next."""
        seconds = 1 / row.tokens_per_second
        old = self._seconds_a_token
        self._seconds_a_token = seconds if old is None else 0.9 * old + 0.1 * seconds
        return self._seconds_a_token * row.tokens / row.step * (steps - row.step)


def open_log(path: Path, step: int) -> TextIO:
    """The log, opened behind the row of that step: rows after it were never saved."""
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
    """The log's whole rows by their columns' names, up to a step."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return [row for row in rows if last is None or int(row["step"]) <= last]


def draw(log: Path, picture: Path) -> bool:
    """Draws the losses over the steps; returns whether matplotlib is there to do so."""
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
    minutes, seconds = divmod(round(left), 60)
    hours, minutes = divmod(minutes, 60)
    parts.append(f"{hours}:{minutes:02}:{seconds:02} left")
    return ", ".join(parts)


def _rich_bar(stream: TextIO) -> tuple[Any, Any]:
    """A bar that runs, and its task; None where rich is missing or the stream no terminal."""
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
