"""Shared by the commands that measure: options and the line about missing kernels; and the bar."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec

import torch

from fastgpt import BackendWarning
from fastgpt.cli.usage import UsageError, missing_kernels, positive, threads

Show = Callable[[int, int, str], object]  # steps done, their total, and the next step


def add_options(sub: argparse.ArgumentParser) -> None:
    """The options --rounds and --threads."""
    sub.add_argument(
        "--rounds",
        type=positive,
        default=5,
        metavar="N",
        help="the least number of timed rounds (%(default)s)",
    )
    sub.add_argument("--threads", type=threads, metavar="N", help="default: as many as torch uses")


def need_rich(message: str) -> None:
    try:
        import rich.progress
        import rich.table  # noqa: F401
    except ImportError:
        raise UsageError(message) from None


@contextmanager
def measuring(threads: int | None, *, show_bar: bool = True) -> Iterator[tuple[Show, str | None]]:
    """Sets the number of threads, if one is given, and says if no fused kernels can run.

    Yields what moves the bar, and why the kernels cannot run. Without a bar, stdout stays empty.
    """
    if threads:
        torch.set_num_threads(threads)
    bar = _bar() if show_bar else nullcontext(_silent)
    with warnings.catch_warnings(), bar as show:
        # A BackendWarning would repeat this line.
        warnings.simplefilter("ignore", BackendWarning)
        missing = missing_kernels()
        if missing:
            line = f"No fused kernels, PyTorch's own operations stand in: {missing}"
            print(line, file=sys.stdout if show_bar else sys.stderr)
        yield show, missing


def bar_on_terminal(wanted: bool) -> AbstractContextManager[Show]:
    """A bar on stderr while the block lasts, if it is wanted, stderr a terminal, rich installed."""
    shown = wanted and sys.stderr.isatty() and find_spec("rich") is not None
    return _bar() if shown else nullcontext(_silent)


def _silent(done: int, total: int, doing: str) -> None:
    """In place of a bar."""


@contextmanager
def _bar() -> Iterator[Show]:
    """A bar on stderr for as long as the block lasts."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(
        *columns,
        console=Console(stderr=True),
        auto_refresh=False,  # a thread that redraws would take time from the measurement
        redirect_stdout=sys.stdout.isatty(),  # else what is printed goes to stderr
    ) as progress:
        task = progress.add_task("", total=None)

        def show(done: int, total: int, doing: str) -> None:
            progress.update(task, completed=done, total=total, description=doing, refresh=True)

        yield show
