"""The `fastgpt` command. One file a subcommand: its arguments, and a function that runs it.

0: done. 1: what was checked doesn't hold, or a run broke off. 2: it couldn't run as asked.
130: interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fastgpt import BackendError, __version__
from fastgpt.cli import bench, compare, generate, info, train
from fastgpt.cli.usage import Failure, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; what the user did wrong is one line on stderr."""
    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except (UsageError, BackendError) as error:
        return _said(args, error, 2)
    except Failure as error:
        return _said(args, error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fastgpt", description="The book's GPT, fast.")
    top.add_argument("--version", action="version", version=f"fastgpt {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (compare, bench, train, generate, info):
        module.add_to(commands)
    return top


def _said(args: argparse.Namespace, error: Exception, code: int) -> int:
    print(f"fastgpt {args.command}: {error}", file=sys.stderr)
    return code
