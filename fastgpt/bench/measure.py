"""Measures every peer of every piece of work, and puts the results into one JSON document."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from fastgpt.bench.bound import machine_peaks
from fastgpt.bench.case import ALL_PEERS, OURS, Case
from fastgpt.bench.formatting import finite
from fastgpt.bench.machine import machine
from fastgpt.bench.memory import WEIGHED, peak_memory
from fastgpt.bench.rounds import enough_rounds, quartiles, steady_rounds
from fastgpt.bench.workloads import Work

FORMAT = 2  # of the document

Progress = Callable[[int, int, str], object]


def measure(
    works: Sequence[Work],
    peers: Sequence[str] = ALL_PEERS,
    *,
    rounds: int = 5,
    progress: Progress = lambda done, total, doing: None,
) -> dict[str, Any]:
    """The document: the machine and its peaks, and for each piece of work the bound and what
    `timed` tells, with each peer's share of the bound, tokens per second and peak memory.

    Args:
        peers: some of `ALL_PEERS`; the reference is always among them.
        progress: called with the number of steps done, their total, and the next step.
    """
    wanted = [p for p in ALL_PEERS if p in peers or p == "reference"]
    total = sum(1 + (len(_weighed(work, wanted)) if work.weigh else 0) for work in works)
    done = itertools.count()
    rows, left_out = [], {}
    peaks = machine_peaks()  # while no model takes memory
    for work in works:
        progress(next(done), total, work.name)
        bound = work.bound
        figures, reasons = timed(work.case(), wanted, rounds)
        left_out.update(reasons)
        for peer in figures["peers"].values():
            peer["share_of_bound"] = None if bound is None else bound / peer["seconds"]
            peer["tokens_per_second"] = work.tokens_done / peer["seconds"]
        for name in _weighed(work, list(figures["peers"])) if work.weigh else ():
            progress(next(done), total, f"memory of {work.name}, {name}")
            bytes_or_why = peak_memory(work, name, torch.get_num_threads())
            key = "memory" if isinstance(bytes_or_why, int) else "no_memory"
            figures["peers"][name][key] = bytes_or_why
        about = {
            "name": work.name,
            "kind": work.kind,
            "config": work.config,
            "size": [work.batch, work.tokens, work.new],
            "uncached": work.uncached,
            "bound": bound,
        }
        rows.append(about | figures)
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


@torch.no_grad()
def timed(
    case: Case, wanted: Sequence[str] = ALL_PEERS, rounds: int = 5
) -> tuple[dict[str, Any], dict[str, str]]:
    """Each peer's seconds (median and quartiles of at least `rounds` interleaved rounds), speed-up
    over the reference (the ratio of the medians) and error, and the fault of ours. A `doubt` says
    why a peer's figures, or all of them, cannot be trusted.

    Returns also which of the wanted peers are left out, and why.
    """
    here = [peer for peer in wanted if peer in case.peers]
    reasons = {peer: why for peer in here if (why := case.why_not(peer))}
    runs = {peer: case.peers[peer] for peer in here if peer not in reasons}
    taken = steady_rounds(runs, enough_rounds(runs, rounds))
    base = taken.median("reference")
    figures = {
        "rounds": len(taken.seconds["reference"]),
        "others": taken.others,
        "doubt": taken.doubt(),
        "fault": case.fault() if any(peer in runs for peer in OURS) else None,
        "peers": {
            peer: {
                "seconds": taken.median(peer),
                "quartiles": list(quartiles(taken.seconds[peer])),
                "doubt": taken.doubt_of(peer),
                "speed_up": base / taken.median(peer),
                "error": finite(case.error(peer)),
            }
            for peer in runs
        },
    }
    return figures, reasons


def _weighed(work: Work, peers: Sequence[str]) -> list[str]:
    """The peers whose memory is measured."""
    return [peer for peer in work.peer_names if peer in WEIGHED and peer in peers]
