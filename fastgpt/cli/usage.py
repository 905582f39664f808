"""What the subcommands share: their errors, and types of arguments."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import TypeAlias

import torch

from fastgpt.dispatch import backends, requested

# What add_subparsers returns; quoted, because it is generic only for the type checker.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


MOST_THREADS = 1024  # OpenMP ends the process where it can't start one


class UsageError(Exception):
    """The command can't run as asked; the message is one line for the user."""


class Failure(Exception):
    """The command started but failed; the message is one line for the user."""


def positive(text: str) -> int:
    """Parses a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def threads(text: str) -> int:
    """An argument that is a number of threads that a process can start."""
    if positive(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {MOST_THREADS} threads")
    return int(text)


def seed(text: str) -> int:
    """Parses a number that ``torch.manual_seed`` accepts."""
    try:
        value = int(text)
    except ValueError:
        value = 1 << 64
    if not -(1 << 63) <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a 64-bit integer")
    return value


def text(value: str) -> str:
    """Parses text as UTF-8, whatever encoding the system has.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        value.encode()
    except UnicodeEncodeError:  # Python could not decode its bytes
        try:
            return os.fsencode(value).decode()
        except UnicodeError:
            raise UsageError(f"{value!r} is not UTF-8 text") from None
    return value


def number(low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """A parser of finite numbers within [low, high]."""
    limits = f" of at least {low:g}" if high == math.inf else f" from {low:g} to {high:g}"
    limits = "" if low == -math.inf else limits

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number{limits}")
        return value

    return parse


def add_device(sub: argparse.ArgumentParser) -> None:
    """Adds --device and --threads."""
    sub.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="(%(default)s)"
    )
    sub.add_argument("--threads", type=threads, metavar="N", help="default: as many as torch uses")


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; on the CPU, torch's error for it has no class of its own."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def missing_kernels() -> str | None:
    """Why the C++ kernels can't run on this machine, or None if they can.

    Raises:
        UsageError: FASTGPT_BACKEND or FASTGPT_CPU_ISA has an unknown value.
    """
    try:
        requested()
        return backends()["cpu"].reason
    except ValueError as error:
        raise UsageError(error) from None
