"""Commands killed, and disks that fail, at drawn moments; then the command is run again."""

import os

import faulty
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.tried import count

# Each example takes a second: tests/test_faults.py has fixed ones.
pytestmark = pytest.mark.skipif(not os.environ.get("FUZZ_MINUTES"), reason="takes make fuzz")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    server = faulty.server(tmp_path_factory.mktemp("server"))
    yield [kind(tmp_path_factory.mktemp("command"), server) for kind in faulty.COMMANDS]
    server.close()


@given(moment=st.integers(1, 1 << 16), again=st.integers(0, 3))
def test_training(commands, moment, again):
    """Killed once or several times, each time while it goes on from where it was."""
    train = commands[0]
    place = train.place()
    for number in range(again + 1):
        nth = (moment * (number + 1)) % train.calls + 1
        outcome = train.run(place, nth)
        assert outcome.code in (-9, 0), outcome.said
        train.check(place)
        count("kills of training", outcome.code == -9)
    train.goes_on(place)
    count("killed runs of training, resumed")


@given(
    which=st.integers(0, len(faulty.COMMANDS) - 1),
    moment=st.integers(0, 1 << 16),
    error=st.sampled_from(["killed", *faulty.ERRORS]),
)
def test_commands(commands, which, moment, error):
    command = commands[which]
    nth = moment % command.calls + 1
    if error == "killed":
        command.killed(nth)
    else:
        command.fails(nth, faulty.ERRORS[error])
    count(f"{type(command).__name__}: {error}")
