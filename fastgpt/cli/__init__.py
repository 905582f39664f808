"""The `fastgpt` command. Each subcommand has a file: its arguments, and a function that runs it.

Exit codes: 0 success; 1 a check or a run failed; 2 wrong usage; 130 interrupted; 141 broken pipe.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from fastgpt import BackendError, __version__
from fastgpt.cli import bench, compare, generate, info, quantize, train
from fastgpt.cli.usage import Failure, UsageError, out_of_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; an error is one line on stderr."""
    _take_any_text()
    command = "fastgpt"
    try:
        try:
            args = parser().parse_args(argv)
            command = f"fastgpt {args.command}"
            code: int = args.run(args)
        finally:
            sys.stdout.flush()  # a full disk or a closed pipe is an error here rather than at exit
    except (UsageError, BackendError) as error:
        return _said(command, error, 2)
    except Failure as error:
        return _said(command, error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, say `| head`, has ended
        _drop_output()
        return 141
    except OSError as error:
        _drop_output()
        where = "output" if error.filename is None else os.fspath(error.filename)
        return _said(command, f"{where}: {error.strerror}" if error.strerror else error, 1)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _said(command, f"out of memory: {error}", 1)
    return code


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fastgpt", description="The book's GPT, fast.")
    top.add_argument("--version", action="version", version=f"fastgpt {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (compare, bench, train, generate, quantize, info):
        module.add_to(commands)
    return top


def _take_any_text() -> None:
    """Lets stdout and stderr print any character.

    Files and pipes get UTF-8; a terminal keeps its encoding, with "?" for other characters. A
    closed stream becomes the null device.
    """
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            chosen = stream.isatty() or "PYTHONIOENCODING" in os.environ
            stream.reconfigure(encoding=None if chosen else "utf-8", errors=errors)


def _drop_output() -> None:
    """Discards unwritten output, which the interpreter would otherwise try to write at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _said(command: str, error: object, code: int) -> int:
    with contextlib.suppress(OSError):  # stderr itself may fail
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
    return code
