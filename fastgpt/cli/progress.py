"""The bar of a command that measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastgpt.cli.usage import UsageError

Show = Callable[[int, int, str], object]  # what is done, of how many, and what comes


def need_rich(message: str) -> None:
    try:
        import rich.progress
        import rich.table  # noqa: F401
    except ImportError:
        raise UsageError(message) from None


def silent(done: int, total: int, doing: str) -> None:
    """In place of a bar."""


@contextmanager
def bar() -> Iterator[Show]:
    """A bar on stderr for as long as the block lasts; what it gives moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    # No thread that redraws: it would take time from whatever is being timed.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("", total=None)

        def show(done: int, total: int, doing: str) -> None:
            progress.update(task, completed=done, total=total, description=doing, refresh=True)

        yield show
