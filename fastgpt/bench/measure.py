"""Measures every peer of every piece of work, and puts the results into one JSON document."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from fastgpt.bench.bound import machine_peaks
from fastgpt.bench.case import JUDGED, Case
from fastgpt.bench.formatting import finite
from fastgpt.bench.machine import machine
from fastgpt.bench.memory import WEIGHED, peak_memory
from fastgpt.bench.peers import PEERS
from fastgpt.bench.quality import quality
from fastgpt.bench.rounds import enough_rounds, quartiles, steady_rounds
from fastgpt.bench.workloads import Work

FORMAT = 3  # of the document

Progress = Callable[[int, int, str], object]


def measure(
    works: Sequence[Work],
    peers: Sequence[str] = tuple(PEERS),
    *,
    rounds: int = 5,
    progress: Progress = lambda done, total, doing: None,
) -> dict[str, Any]:
    """The document: the machine and its peaks, and for each piece of work the bound and what
    `timed` tells, with each peer's share of the bound, tokens per second and peak memory; and what
    fastgpt's precisions below float32 cost on real text.

    Args:
        peers: some of `PEERS`; what a piece of work is compared with is always among them.
        progress: called with the number of steps done, their total, and the next step.
    """
    wanted = [p for p in PEERS if p in peers or p == "reference"]
    ours = [PEERS[p] for p in wanted if PEERS[p].engine == "fastgpt" and not PEERS[p].is_float32]
    narrow = [peer.precision for peer in ours if not peer.missing()]
    total = sum(1 + (len(_weighed(work, wanted)) if work.weigh else 0) for work in works)
    total += bool(narrow)
    done = itertools.count()
    rows, left_out = [], {}
    peaks = machine_peaks()  # while no model takes memory
    for work in works:
        progress(next(done), total, work.name)
        bound = work.bound
        figures, reasons = timed(work.case(), wanted, rounds)
        left_out.update(reasons)
        for name, peer in figures["peers"].items():
            exact = PEERS[name].is_float32  # a narrow weight takes fewer bytes than the bound's
            peer["share_of_bound"] = bound / peer["seconds"] if bound and exact else None
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
            "size": work.size,
            "uncached": work.uncached,
            "bound": bound,
        }
        rows.append(about | figures)
    if narrow:
        progress(next(done), total, "precision on real text")
    measured_quality = quality(narrow) if narrow else []
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
        "quality": measured_quality,
    }


@torch.no_grad()
def timed(
    case: Case, wanted: Sequence[str] = tuple(PEERS), rounds: int = 5
) -> tuple[dict[str, Any], dict[str, str]]:
    """Each peer's seconds (median and quartiles of at least `rounds` interleaved rounds, or of the
    case's own number if that is less), speed-up over the `base` (the ratio of the medians) and
    error, and the fault of ours. A `doubt` says why a peer's figures, or all of them, cannot be
    trusted.

    Returns also which of the wanted peers are left out, and why.
    """
    here = [p for p in PEERS if p in case.peers and (p in wanted or p == case.base)]
    reasons = {peer: why for peer in here if (why := case.why_not(peer))}
    runs = {peer: case.peers[peer] for peer in here if peer not in reasons}
    rounds = min(rounds, case.rounds) if case.rounds else enough_rounds(runs, rounds)
    taken = steady_rounds(runs, rounds)
    base = taken.median(case.base)
    figures = {
        "base": case.base,
        "rounds": len(taken.seconds[case.base]),
        "others": taken.others,
        "doubt": taken.doubt(),
        "fault": case.fault() if any(peer in runs for peer in JUDGED) else None,
        "peers": {
            peer: {
                "seconds": taken.median(peer),
                "quartiles": list(quartiles(taken.seconds[peer])),
                "doubt": taken.doubt_of(peer),
                "speed_up": base / taken.median(peer),
                "error": None,
                **{measure: finite(value) for measure, value in case.errors(peer).items()},
            }
            for peer in runs
        },
    }
    return figures, reasons


def _weighed(work: Work, peers: Sequence[str]) -> list[str]:
    """The peers whose memory is measured."""
    return [peer for peer in work.peer_names if peer in WEIGHED and peer in peers]
