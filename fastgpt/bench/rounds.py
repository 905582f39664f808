"""Times peers in turns, and says what of it can't be trusted.

A neighbour that takes the processors away makes some rounds slow, or one peer slower than another.
Both show: in the quartiles of a peer's rounds, and in how busy other programs kept the processors.
Then the rounds are taken again, a few times at most.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch

from fastgpt.bench.formatting import readable

MOST_TRIES, MOST_SECONDS = 4, 120.0  # no try starts later
MOST_SPREAD = 0.25  # of the median, between the quartiles
MOST_BUSY = 0.1  # of each processor that a thread of ours needs
SHORTEST = 0.2  # seconds: the system counts in hundredths

Peers = Mapping[str, Callable[[], object]]


class Rounds(NamedTuple):
    """The seconds of each peer's calls, and how many processors others kept busy meanwhile."""

    seconds: dict[str, list[float]]
    others: float | None  # None where nothing tells

    def doubt(self) -> str | None:
        """Why none of these rounds can be trusted; None if they can."""
        return doubt_of_load(self.others)

    def doubtful(self) -> bool:
        """Whether anything here can't be trusted."""
        return self.doubt() is not None or any(map(doubt_of_seconds, self.seconds.values()))


def interleaved(
    peers: Peers, rounds: int, before_round: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Call every peer once a round, for `rounds` rounds; return the seconds of each call."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        before_round()
        for name, run in peers.items():
            start = time.perf_counter()
            result = run()
            seconds[name].append(time.perf_counter() - start)
            del result  # freed outside the timing, before the next peer needs the memory
    return seconds


def steady_rounds(
    peers: Peers,
    rounds: int,
    before_round: Callable[[], object] = lambda: None,
    before_again: Callable[[], object] = lambda: None,
) -> Rounds:
    """The first `rounds` rounds in a row that can be trusted; where a few tries bring none, the
    rounds of all of them.
    """
    everything: dict[str, list[float]] = {name: [] for name in peers}
    end, whole = time.perf_counter() + MOST_SECONDS, Load()
    for number in range(MOST_TRIES):
        if number:
            if time.perf_counter() > end:
                break
            before_again()
        load = Load()
        tried = Rounds(interleaved(peers, rounds, before_round), load.others())
        if not tried.doubtful():
            return tried
        for name, seconds in tried.seconds.items():
            everything[name] += seconds
    return Rounds(everything, whole.others())


def quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of one call itself, twice."""
    if len(seconds) == 1:
        return seconds[0], seconds[0]
    # Inclusive: of few rounds the other method's quartiles lie outside what was measured.
    first, _, third = quantiles(seconds, n=4, method="inclusive")
    return first, third


def doubt_of_seconds(seconds: Sequence[float]) -> str | None:
    """Why a peer's median can't be trusted; None if it can."""
    first, third = quartiles(seconds)
    if third - first <= MOST_SPREAD * median(seconds):
        return None
    return f"a quarter of its rounds took under {readable(first)}, another over {readable(third)}"


def doubt_of_load(others: float | None) -> str | None:
    """Why nothing measured meanwhile can be trusted; None if other programs left enough free.

    Args:
        others: how many processors they kept busy.
    """
    count, threads = len(_processors()), torch.get_num_threads()
    spare = max(0, count - threads)
    if others is None or others - spare <= MOST_BUSY * threads:
        return None
    return f"other programs kept {others:.1f} of {count} processors busy"


class Load:
    """What other programs take of the processors that this one may use, from its making on."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.perf_counter(), busy_seconds(), own_seconds()

    def others(self) -> float | None:
        """How many processors they keep busy on average; None where nothing tells, or too soon."""
        elapsed, busy = time.perf_counter() - self._began, busy_seconds()
        if busy is None or self._busy is None:
            return _others_by_load_average()
        if elapsed < SHORTEST:
            return None
        return max(0.0, busy - self._busy - (own_seconds() - self._own)) / elapsed


def busy_seconds() -> float | None:
    """The time that these processors have worked, or were taken away by another virtual machine;
    None where the system doesn't tell.
    """
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    names, ticks = {f"cpu{number}" for number in _processors()}, 0
    for name, *values in map(str.split, lines):
        if name in names:
            user, nice, system, _, _, irq, softirq, steal = map(int, values[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """The processor time of this process, all threads together."""
    return time.process_time()


def _others_by_load_average() -> float | None:
    """The last minute's, less what our threads may have added to it."""
    if not hasattr(os, "getloadavg"):
        return None
    return max(0.0, os.getloadavg()[0] - torch.get_num_threads())


def _processors() -> set[int]:
    """The numbers of those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
