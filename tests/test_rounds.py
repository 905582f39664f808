"""Rounds in turns: when they are taken again, and what is said of those that can't be trusted."""

import functools
import math
import os

import pytest
import torch

from fastgpt.bench import rounds
from fastgpt.bench.rounds import Load, Rounds, doubt_of_load, doubt_of_seconds, steady_rounds

STEADY, UNSTEADY = [1.0, 1.01, 1.02, 1.1], [1.0, 1.0, 2.0, 9.0]


@pytest.fixture
def machine(monkeypatch):
    """Four processors of which torch's threads take two; what tries bring, and others take."""

    class Machine:
        tries, busy = [], []
        taken, again = 0, 0

        def interleaved(self, peers, count, before_round):
            assert count == 4
            seconds = self.tries[min(self.taken, len(self.tries) - 1)]
            self.taken += 1
            return {peer: list(seconds) for peer in peers}

        def others(self):
            return self.busy[min(self.taken - 1, len(self.busy) - 1)] if self.busy else None

        def rounds(self):
            def once_more():
                self.again += 1

            return steady_rounds({"a": print, "b": print}, 4, before_again=once_more)

    machine = Machine()
    monkeypatch.setattr(rounds, "interleaved", machine.interleaved)
    monkeypatch.setattr(rounds.Load, "others", lambda load: machine.others())
    monkeypatch.setattr(rounds, "_processors", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return machine


def test_interleaved():
    calls = []
    peers = {name: functools.partial(calls.append, name) for name in "ab"}
    seconds = rounds.interleaved(peers, 3, lambda: calls.append("|"))
    assert "".join(calls) == "|ab|ab|ab"
    assert [len(seconds[name]) for name in "ab"] == [3, 3]


def test_steady_rounds_are_taken_once(machine):
    machine.tries = [STEADY]
    assert machine.rounds() == Rounds({"a": STEADY, "b": STEADY}, None)
    assert (machine.taken, machine.again) == (1, 0)


def test_unsteady_rounds_are_taken_again_and_dropped(machine):
    machine.tries = [UNSTEADY, UNSTEADY, STEADY]
    taken = machine.rounds()
    assert taken.seconds == {"a": STEADY, "b": STEADY}
    assert not taken.doubtful()
    assert (machine.taken, machine.again) == (3, 2)


def test_rounds_beside_a_busy_neighbour_are_taken_again_however_steady(machine):
    machine.tries, machine.busy = [STEADY], [3.5, 0.5]
    taken = machine.rounds()
    assert (taken.others, taken.doubt(), machine.taken) == (0.5, None, 2)


def test_where_it_never_gets_quiet_all_rounds_are_kept_and_doubted(machine):
    machine.tries, machine.busy = [STEADY], [3.5]
    taken = machine.rounds()
    assert machine.taken == rounds.MOST_TRIES
    assert taken.seconds["a"] == STEADY * rounds.MOST_TRIES
    assert taken.doubt() == "other programs kept 3.5 of 4 processors busy"
    machine.taken, machine.tries, machine.busy = 0, [UNSTEADY], []
    taken = machine.rounds()
    assert (machine.taken, taken.doubt()) == (rounds.MOST_TRIES, None)
    assert taken.doubtful()


def test_no_try_starts_once_the_time_is_up(machine, monkeypatch):
    machine.tries = [UNSTEADY]
    monkeypatch.setattr(rounds, "MOST_SECONDS", -1.0)
    machine.rounds()
    assert machine.taken == 1


def test_doubt_of_seconds():
    assert doubt_of_seconds(STEADY) is None
    assert doubt_of_seconds([7.0]) is None
    doubt = doubt_of_seconds([0.001, 0.001, 0.002, 0.003])
    assert doubt == "a quarter of its rounds took under 1.00 ms, another over 2.25 ms"


@pytest.mark.parametrize(
    ("others", "doubted"), [(None, False), (0.0, False), (2.1, False), (2.3, True), (4.0, True)]
)
def test_others_may_have_the_processors_that_our_threads_leave(machine, others, doubted):
    assert (doubt_of_load(others) is not None) == doubted


def test_others_are_what_is_busy_but_for_us(monkeypatch):
    now = {"perf_counter": 10.0, "busy": 100.0, "own": 20.0}
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: now["perf_counter"])
    monkeypatch.setattr(rounds, "busy_seconds", lambda: now["busy"])
    monkeypatch.setattr(rounds, "own_seconds", lambda: now["own"])
    load = Load()
    now["perf_counter"] += rounds.SHORTEST / 2
    assert load.others() is None
    now.update(perf_counter=14.0, busy=110.0, own=24.0)
    assert load.others() == 1.5
    now.update(busy=103.0)  # counted in hundredths, so less than ours
    assert load.others() == 0.0


def test_busy_seconds_are_those_of_our_processors(monkeypatch):
    text = (
        "cpu  9 9 9 9 9 9 9 9 9 9\n"
        "cpu0 100 20 30 4000 500 6 7 8 90 90\n"
        "cpu1 1 1 1 1 1 1 1 1 1 1\n"
        "cpu10 1000 0 0 0 0 0 0 0 0 0\n"
        "intr 5\n"
    )
    monkeypatch.setattr(rounds.Path, "read_text", lambda path: text)
    monkeypatch.setattr(rounds, "_processors", lambda: {0, 10})
    monkeypatch.setattr(os, "sysconf", lambda name: 100, raising=False)
    assert rounds.busy_seconds() == (100 + 20 + 30 + 6 + 7 + 8 + 1000) / 100


def test_where_nothing_counts_processor_time_the_load_average_tells(monkeypatch):
    monkeypatch.setattr(rounds, "busy_seconds", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (5.5, 1.0, 1.0), raising=False)
    assert Load().others() == 3.5
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 1.0, 1.0), raising=False)
    assert Load().others() == 0.0
    monkeypatch.delattr(os, "getloadavg")
    assert Load().others() is None


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="no /proc/stat")
def test_this_machine_counts_its_processor_time():
    busy = rounds.busy_seconds()
    assert math.isfinite(busy)
    assert busy > 0
