"""The progress bar of a command that measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastgpt.cli.usage import UsageError

Show = Callable[[int, int, str], object]  # steps done, steps in all, what runs now


def need_rich(message: str) -> None:
    try:
        import rich.progress
        import rich.table  # noqa: F401
    except ImportError:
        raise UsageError(message) from None


def silent(done: int, total: int, doing: str) -> None:
    """Shows nothing."""


@contextmanager
def bar() -> Iterator[Show]:
    """Shows a bar on stderr while the block runs, and yields the function that updates it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    # No thread redraws it: that would disturb the timing.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("", total=None)

        def show(done: int, total: int, doing: str) -> None:
            progress.update(task, completed=done, total=total, description=doing, refresh=True)

        yield show
