"""`python -m benchmarks`: a table of speeds relative to the reference, with each peer's error.

The peers take turns in one process, so that a busy neighbour hits all alike, and each one's fastest
round counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from math import ceil

import torch

from fastgpt.bench.case import ALL_PEERS, Case
from fastgpt.bench.words import readable
from fastgpt.compare import interleaved
from fastgpt.machine import machine_line

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

Timings = dict[str, tuple[float, float | None]]  # of one case: peer -> seconds, error


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
            first = interleaved(peers, 1)
            once = sum(map(sum, first.values()))
            more = interleaved(peers, min(max(ROUNDS - 1, ceil(2 / once)), 1000))
            yield name, {p: (min(first[p] + more[p]), case.error(p)) for p in peers}


def print_table(table: dict[str, Timings]) -> None:
    """A row a case: the reference's time, every other peer's speed-up over it, and all errors."""
    shown = [peer for peer in ALL_PEERS if any(peer in timings for timings in table.values())]
    rows = [["work", *shown], ["---"] * (1 + len(shown))]
    for name, timings in table.items():
        base, base_error = timings["reference"]
        cells = [readable(base) + ("" if base_error is None else f", {base_error:.1e}")]
        for peer in shown[1:]:
            seconds, error = timings.get(peer, (None, None))
            speed = "-" if seconds is None else f"{base / seconds:.2f}x"
            cells.append(speed if error is None else f"{speed}, {error:.1e}")
        rows.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("| " + " | ".join(map(str.ljust, row, widths)) + " |")
    print("\nReference: time; the others: how many times as fast, by the fastest of interleaved")
    print("rounds. Then the largest error against float64; of decode, how far a chosen token's")
    print("logit lies below the greatest one, in float64.")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
