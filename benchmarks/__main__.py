"""`python -m benchmarks`: a table of speeds relative to the reference, with each peer's error.

By default it runs `pytest benchmarks --benchmark-only`, which times one peer after the other.
`--interleaved` times them in turns in one process instead, so that a busy neighbour hits all alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from math import ceil
from pathlib import Path
from statistics import median

import torch

from benchmarks.case import PEERS, Case
from fastgpt.compare import interleaved
from fastgpt.machine import machine_line

FOLDER = Path(__file__).parent
OPERATIONS = ("layer_norm", "gelu", "causal_attention", "forward")

Timings = dict[str, tuple[float, float]]  # of one case: peer -> median seconds, largest error


def main() -> int:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    top.add_argument("operation", nargs="*", help=f"of {', '.join(OPERATIONS)} (default: all)")
    top.add_argument("--interleaved", action="store_true", help="time the peers in turns")
    args = top.parse_args()
    operations = args.operation or OPERATIONS
    if unknown := set(operations) - set(OPERATIONS):
        top.error(f"no benchmark of {', '.join(sorted(unknown))}, only of {', '.join(OPERATIONS)}")

    if args.interleaved:
        code, table = 0, dict(in_turns(operations))
    else:
        code, table = through_pytest(operations)
    print_table(table)
    print(f"\n{machine_line()}")
    return code


def through_pytest(operations: list[str]) -> tuple[int, dict[str, Timings]]:
    """pytest's exit code, and what pytest-benchmark measured."""
    files = [str(FOLDER / f"bench_{operation}.py") for operation in operations]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        options = ["--benchmark-only", f"--benchmark-json={report}", "-q"]
        code = subprocess.run([sys.executable, "-m", "pytest", *files, *options]).returncode
        rows = json.loads(report.read_text())["benchmarks"] if report.exists() else []
    table: dict[str, Timings] = {}
    for row in rows:
        timing = (row["stats"]["median"], row["extra_info"]["max_abs_error"])
        table.setdefault(row["group"], {})[row["name"]] = timing
    return code, table


@torch.no_grad()
def in_turns(operations: list[str]) -> Iterator[tuple[str, Timings]]:
    """Each case's name and timings, the peers one after another within each round."""
    for operation in operations:
        for name, build in import_module(f"benchmarks.bench_{operation}").CASES.items():
            print(name, file=sys.stderr, flush=True)
            torch.manual_seed(123)
            case: Case = build()
            peers = {peer: case.peers[peer] for peer in PEERS if case.can_run(peer)}
            case.check()
            once = sum(map(sum, interleaved(peers, 1).values()))
            seconds = interleaved(peers, min(max(5, ceil(2 / once)), 1000))
            yield name, {peer: (median(seconds[peer]), case.error(peer)) for peer in peers}


def print_table(table: dict[str, Timings]) -> None:
    """A row a case: the reference's median, every other peer's speed-up over it, and all errors."""
    rows = [["work", *PEERS], ["---"] * (1 + len(PEERS))]
    for name, timings in table.items():
        if "reference" not in timings:  # its benchmark failed, and pytest said why
            continue
        base, base_error = timings["reference"]
        cells = [f"{_readable(base)}, {base_error:.1e}"]
        for peer in PEERS[1:]:
            if peer in timings:
                seconds, error = timings[peer]
                cells.append(f"{base / seconds:.2f}x, {error:.1e}")
            else:
                cells.append("-")
        rows.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("| " + " | ".join(map(str.ljust, row, widths)) + " |")
    print("\nReference: median time; the others: how many times as fast. Then the largest error")
    print("against float64.")


def _readable(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
