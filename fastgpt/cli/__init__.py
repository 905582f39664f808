"""The `fastgpt` command. One file a subcommand: its arguments, and a function that runs it.

0: done. 1: what was checked doesn't hold, or a run broke off. 2: it couldn't run as asked.
130: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from fastgpt import BackendError, __version__
from fastgpt.cli import bench, compare, generate, info, train
from fastgpt.cli.usage import Failure, UsageError, out_of_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; what the user did wrong is one line on stderr."""
    _take_any_text()
    command = "fastgpt"
    try:
        try:
            args = parser().parse_args(argv)
            command = f"fastgpt {args.command}"
            code: int = args.run(args)
        finally:
            sys.stdout.flush()  # a full disk or a closed pipe shows here rather than at the end
    except (UsageError, BackendError) as error:
        return _said(command, error, 2)
    except Failure as error:
        return _said(command, error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        _drop_output()
        return 141
    except OSError as error:
        _drop_output()
        where = "output" if error.filename is None else os.fspath(error.filename)
        return _said(command, f"{where}: {error.strerror or error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _said(command, f"there is too little memory: {error}", 1)
    return code


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fastgpt", description="The book's GPT, fast.")
    top.add_argument("--version", action="version", version=f"fastgpt {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (compare, bench, train, generate, info):
        module.add_to(commands)
    return top


def _take_any_text() -> None:
    """Lets both streams take all characters: files and pipes get UTF-8, a terminal what it has,
    with "?" for what it lacks. A stream that the caller has closed becomes the null device.
    """
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            chosen = stream.isatty() or "PYTHONIOENCODING" in os.environ
            stream.reconfigure(encoding=None if chosen else "utf-8", errors=errors)


def _drop_output() -> None:
    """What could not be written is dropped, or the interpreter's end would try again."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _said(command: str, error: object, code: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be what can't be written
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
    return code
