"""Kills and failing disks at calls that change one: the old stays, or the new is complete.

`make faults` takes every call and every error; `make fuzz` draws kills of runs that were killed
before: tests/fuzz/test_kills.py.
"""

import os

import faulty
import pytest

ALL = os.environ.get("FAULTS") == "all"
# Of a command's calls, one in so many.
EVERY = {"Train": 33, "Quantise": 2, "Answer": 4, "Report": 8}


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    server = faulty.server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module", params=faulty.COMMANDS, ids=lambda command: command.__name__)
def command(request, forked, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("command"), forked)


def some_calls(command, first=1):
    if ALL:
        return range(1, command.calls + 1)
    return range(first, command.calls + 1, EVERY[type(command).__name__])


def test_killed_at_calls_that_change_the_disk(command):
    for nth in some_calls(command):
        command.killed(nth)
    print(f"{type(command).__name__}: killed {len(some_calls(command))} times")


def test_disks_that_fail(command):
    trials = failed = 0
    for number, nth in enumerate(some_calls(command, first=2)):
        errors = list(faulty.ERRORS.values())
        for error in errors if ALL else [errors[number % len(errors)]]:
            trials += 1
            failed += command.fails(nth, error)
    print(f"{type(command).__name__}: {trials} failing calls, {failed} ended the command")
    assert failed > 0
