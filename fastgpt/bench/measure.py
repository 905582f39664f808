"""Times every peer of every piece of work, in turns, and puts the result into one JSON document."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from math import ceil
from statistics import median
from typing import Any

import torch

from fastgpt.bench.bound import machine_peaks
from fastgpt.bench.case import ALL_PEERS, OURS
from fastgpt.bench.machine import machine
from fastgpt.bench.memory import WEIGHED, peak_memory
from fastgpt.bench.rounds import doubt_of_seconds, interleaved, quartiles, steady_rounds
from fastgpt.bench.workloads import Work

FORMAT = 2  # of the document
ENOUGH_SECONDS = 2.0  # for all peers of a piece of work together
MOST_ROUNDS = 200

Progress = Callable[[int, int, str], object]


def measure(
    works: Sequence[Work],
    peers: Sequence[str] = ALL_PEERS,
    *,
    rounds: int = 5,
    progress: Progress = lambda done, total, doing: None,
) -> dict[str, Any]:
    """The document: the machine and its peaks, and for each piece of work the bound and each peer's
    seconds (median and quartiles of at least `rounds` interleaved rounds), speed-up over the
    reference (the ratio of the medians), share of the bound, error against float64 and peak memory.
    A `doubt` says in words why a figure, or a row of them, can't be trusted.

    Args:
        peers: of `ALL_PEERS`; the reference is always among them.
        progress: called with what is done, of how many, and what comes.
    """
    wanted = [p for p in ALL_PEERS if p in peers or p == "reference"]
    total = sum(1 + (len(_weighed(work, wanted)) if work.weigh else 0) for work in works)
    done = itertools.count()
    rows, left_out = [], {}
    peaks = machine_peaks()  # while no model takes memory
    for work in works:
        progress(next(done), total, work.name)
        row, reasons = _timed(work, wanted, rounds)
        left_out.update(reasons)
        for peer in _weighed(work, list(row["peers"])) if work.weigh else ():
            progress(next(done), total, f"memory of {work.name}, {peer}")
            bytes_or_why = peak_memory(work, peer, torch.get_num_threads())
            key = "memory" if isinstance(bytes_or_why, int) else "no_memory"
            row["peers"][peer][key] = bytes_or_why
        rows.append(row)
    progress(total, total, "done")
    return {
        "command": "bench",
        "format": FORMAT,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "peaks": peaks,
        "agree": all(row["fault"] is None for row in rows),
        "left_out": left_out,
        "works": rows,
    }


def _weighed(work: Work, peers: Sequence[str]) -> list[str]:
    """The peers whose memory is measured: those that do this work at all."""
    no_peers = {"forward": ("loss",), "train": ("torch",), "decode": ("torch", "loss")}
    return [peer for peer in peers if peer in WEIGHED and peer not in no_peers[work.kind]]


def _timed(work: Work, wanted: Sequence[str], rounds: int) -> tuple[dict[str, Any], dict[str, str]]:
    """A piece of work's row, and which of the wanted peers are left out and why."""
    case = work.case()
    here = [peer for peer in wanted if peer in case.peers]
    reasons = {peer: why for peer in here if (why := case.why_not(peer))}
    runs = {peer: case.peers[peer] for peer in here if peer not in reasons}
    with torch.no_grad():
        once = sum(map(sum, interleaved(runs, 1).values()))
        enough = min(ceil(ENOUGH_SECONDS / once), MOST_ROUNDS)
        rounds_taken = steady_rounds(runs, max(rounds, enough))
    seconds = rounds_taken.seconds
    base, bound = median(seconds["reference"]), work.bound
    rows = {}
    for peer in runs:
        middle = median(seconds[peer])
        rows[peer] = {
            "seconds": middle,
            "quartiles": list(quartiles(seconds[peer])),
            "doubt": doubt_of_seconds(seconds[peer]),
            "speed_up": base / middle,
            "share_of_bound": None if bound is None else bound / middle,
            "tokens_per_second": work.tokens_done / middle,
            "error": _finite(case.error(peer)),
        }
    row = {
        "name": work.name,
        "kind": work.kind,
        "config": work.config,
        "size": [work.batch, work.tokens, work.new],
        "uncached": work.uncached,
        "rounds": len(seconds["reference"]),
        "others": rounds_taken.others,
        "doubt": rounds_taken.doubt(),
        "fault": case.fault() if any(p in runs for p in OURS) else None,
        "bound": bound,
        "peers": rows,
    }
    return row, reasons


def _finite(value: float | None) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if value is not None and math.isfinite(value) else None
