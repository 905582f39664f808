"""`python -m benchmarks`: a table of speeds relative to the reference, with each peer's error.

The peers take turns in one process, so that a busy neighbour hits all alike, and medians are
compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from math import ceil
from statistics import median

import torch

from fastgpt.bench.case import ALL_PEERS, Case
from fastgpt.bench.formatting import readable
from fastgpt.bench.machine import machine_line
from fastgpt.bench.rounds import Rounds, doubt_of_seconds, interleaved, steady_rounds

OPERATIONS = (
    "embedding",
    "layer_norm",
    "causal_attention",
    "linear",
    "gelu",
    "linear_cross_entropy",
    "forward",
    "train",
    "decode",
)
ROUNDS = 4  # at least

Timing = tuple[float, float | None, bool]  # seconds, error, whether the seconds can't be trusted
Timings = dict[str, Timing]  # of one case, by peer


def main() -> int:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    top.add_argument("operation", nargs="*", help=f"of {', '.join(OPERATIONS)} (default: all)")
    operations = top.parse_args().operation or OPERATIONS
    if unknown := set(operations) - set(OPERATIONS):
        top.error(f"no benchmark of {', '.join(sorted(unknown))}, only of {', '.join(OPERATIONS)}")
    print_table(dict(in_turns(operations)))
    print(f"\n{machine_line()}")
    return 0


@torch.no_grad()
def in_turns(operations: Iterable[str]) -> Iterator[tuple[str, Timings]]:
    """Each case's name and timings, the peers one after another within each round."""
    told = set()
    for operation in operations:
        for name, build in import_module(f"benchmarks.bench_{operation}").CASES.items():
            print(name, file=sys.stderr, flush=True)
            torch.manual_seed(123)
            case: Case = build()
            reasons = {peer: case.why_not(peer) for peer in [*case.peers, *case.skipped]}
            for peer, reason in reasons.items():
                if reason and (peer, reason) not in told:
                    print(f"  without {peer}: {reason}", file=sys.stderr, flush=True)
                    told.add((peer, reason))
            peers = {peer: run for peer, run in case.peers.items() if not reasons[peer]}
            case.check()
            once = sum(map(sum, interleaved(peers, 1).values()))
            taken = steady_rounds(peers, min(max(ROUNDS, ceil(2 / once)), 1000))
            if taken.doubt():
                print(f"  don't trust it: {taken.doubt()}", file=sys.stderr, flush=True)
            yield name, {p: _timing(taken, p, case.error(p)) for p in peers}


def _timing(taken: Rounds, peer: str, error: float | None) -> Timing:
    seconds = taken.seconds[peer]
    return median(seconds), error, bool(taken.doubt() or doubt_of_seconds(seconds))


def print_table(table: dict[str, Timings]) -> None:
    """A row a case: the reference's time, every other peer's speed-up over it, and all errors."""
    shown = [peer for peer in ALL_PEERS if any(peer in timings for timings in table.values())]
    rows = [["work", *shown], ["---"] * (1 + len(shown))]
    for name, timings in table.items():
        base, _, base_doubtful = timings["reference"]
        cells = []
        for peer in shown:
            if peer not in timings:
                cells.append("-")
                continue
            seconds, error, doubtful = timings[peer]
            text = readable(seconds) if peer == "reference" else f"{base / seconds:.2f}x"
            text += " ?" if doubtful or base_doubtful else ""
            cells.append(text if error is None else f"{text}, {error:.1e}")
        rows.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("| " + " | ".join(map(str.ljust, row, widths)) + " |")
    print("\nReference: time; the others: how many times as fast, by the medians of interleaved")
    print("rounds, with a question mark where the machine was too busy or too unsteady to tell.")
    print("Then the largest error against float64; of decode, how far a chosen token's")
    print("logit lies below the greatest one, in float64.")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
