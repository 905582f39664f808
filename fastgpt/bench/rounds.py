"""The timer: peers take turns, a peer's time is the median of its rounds, and a time that cannot be
trusted is marked.

A busy neighbour makes some rounds slow, or one peer slower than another. Both show: in the
quartiles of a peer's rounds, and in how busy other programs kept the processors. The rounds are
then repeated, a few times at most.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch

from fastgpt.bench.formatting import readable

ENOUGH_SECONDS, MOST_ROUNDS = 2.0, 1000  # of a try, all peers together
MOST_TRIES, MOST_SECONDS = 4, 120.0  # no try starts later
MOST_SPREAD = 0.25  # of the median, between the quartiles
MOST_BUSY = 0.1  # of each processor that a thread of ours needs
SHORTEST = 0.2  # seconds: the system counts in hundredths
CPU = torch.device("cpu")

Peers = Mapping[str, Callable[[], object]]


class Rounds(NamedTuple):
    """The seconds of each peer's calls, and how many processors other programs kept busy."""

    seconds: dict[str, list[float]]
    others: float | None  # None if nothing tells

    def median(self, peer: str) -> float:
        """A peer's time, in seconds."""
        return median(self.seconds[peer])

    def doubt(self) -> str | None:
        """Why none of these rounds can be trusted; None if they can."""
        return doubt_of_load(self.others)

    def doubt_of(self, peer: str) -> str | None:
        """Why a peer's time cannot be trusted; None if it can."""
        return doubt_of_seconds(self.seconds[peer])

    def doubtful(self) -> bool:
        """Whether any of it cannot be trusted."""
        return self.doubt() is not None or any(map(self.doubt_of, self.seconds))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(run: Callable[[], object], device: torch.device = CPU) -> float:
    """The seconds of one call, with what it leaves to the device."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    seconds = time.perf_counter() - start
    del result  # freed outside the timing, before the next call needs the memory
    return seconds


def interleaved(
    peers: Peers,
    rounds: int,
    before_round: Callable[[], object] = lambda: None,
    device: torch.device = CPU,
) -> dict[str, list[float]]:
    """Call every peer once a round, for `rounds` rounds; return the seconds of each call."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        before_round()
        for name, run in peers.items():
            seconds[name].append(seconds_of(run, device))
    return seconds


def enough_rounds(peers: Peers, at_least: int) -> int:
    """How many rounds fill a try; takes one round to tell."""
    once = sum(map(sum, interleaved(peers, 1).values()))
    return max(at_least, min(ceil(ENOUGH_SECONDS / once), MOST_ROUNDS))


def steady_rounds(
    peers: Peers,
    rounds: int,
    before_round: Callable[[], object] = lambda: None,
    before_again: Callable[[], object] = lambda: None,
) -> Rounds:
    """The first `rounds` rounds in a row that can be trusted, or the rounds of all tries if none
    can.
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
    """The first and the third quartile."""
    if len(seconds) == 1:
        return seconds[0], seconds[0]
    # Inclusive: the other method's quartiles of a few rounds lie outside what was measured.
    first, _, third = quantiles(seconds, n=4, method="inclusive")
    return first, third


def doubt_of_seconds(seconds: Sequence[float]) -> str | None:
    """Why the median of these cannot be trusted; None if it can."""
    first, third = quartiles(seconds)
    if third - first <= MOST_SPREAD * median(seconds):
        return None
    return f"a quarter of its rounds took under {readable(first)}, another over {readable(third)}"


def doubt_of_load(others: float | None) -> str | None:
    """Why nothing can be trusted that was measured while other programs kept so many processors
    busy; None if they left enough free.
    """
    count, threads = len(_processors()), torch.get_num_threads()
    spare = max(0, count - threads)
    if others is None or others - spare <= MOST_BUSY * threads:
        return None
    return f"other programs kept {others:.1f} of {count} processors busy"


class Load:
    """How busy other programs keep the processors that this one may use, from now on."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.perf_counter(), busy_seconds(), own_seconds()

    def others(self) -> float | None:
        """How many processors on average; None if nothing tells, or too little time has passed."""
        elapsed, busy = time.perf_counter() - self._began, busy_seconds()
        if busy is None or self._busy is None:
            return _others_by_load_average()
        if elapsed < SHORTEST:
            return None
        return max(0.0, busy - self._busy - (own_seconds() - self._own)) / elapsed


def busy_seconds() -> float | None:
    """The seconds for which these processors have worked, or were taken by another virtual machine;
    None if the system does not tell.
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
    """The processor time of all threads of this process."""
    return time.process_time()


def _others_by_load_average() -> float | None:
    """The load average of the last minute, less what our threads may have added to it."""
    if not hasattr(os, "getloadavg"):
        return None
    return max(0.0, os.getloadavg()[0] - torch.get_num_threads())


def _processors() -> set[int]:
    """The numbers of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
