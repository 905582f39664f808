"""What the subcommands share: their errors, and the kinds of argument."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import TypeAlias

import torch

from fastgpt.dispatch import backends, requested

# What add_subparsers returns; quoted, for it is generic to the type checker alone.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


MOST_THREADS = 1024  # OpenMP ends the process where it can't start one


class UsageError(Exception):
    """The command can't run as asked; the message is one line for the user."""


class Failure(Exception):
    """The command ran, and broke off; the message is one line for the user."""


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def threads(text: str) -> int:
    """An argument that is a number of threads that a process can start."""
    if positive(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {MOST_THREADS} threads")
    return int(text)


def seed(text: str) -> int:
    """An argument that ``torch.manual_seed`` takes."""
    try:
        value = int(text)
    except ValueError:
        value = 1 << 64
    if not -(1 << 63) <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 64 bits")
    return value


def text(value: str) -> str:
    """An argument that is text: UTF-8, whatever encoding the system has.

    Raises:
        UsageError: it is not.
    """
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes that Python could not decode
        try:
            return os.fsencode(value).decode()
        except UnicodeError:
            raise UsageError(f"{value!r} is not UTF-8 text") from None
    return value


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argument that is a finite number within [low, high]."""
    limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}")
        return value

    return parse


def out_of_memory(error: Exception) -> bool:
    """Whether memory is what lacked; on the CPU, torch's error has no class of its own."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def missing_kernels() -> str | None:
    """Why the C++ kernels can't run here, or None.

    Raises:
        UsageError: FASTGPT_BACKEND or FASTGPT_CPU_ISA names what isn't there.
    """
    try:
        requested()
        return backends()["cpu"].reason
    except ValueError as error:
        raise UsageError(error) from None
