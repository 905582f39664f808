"""`python -m benchmarks`: for each operation a table of speeds relative to the reference, with each
peer's error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from benchmarks import (
    bench_causal_attention,
    bench_embedding,
    bench_gelu,
    bench_invariance,
    bench_layer_norm,
    bench_linear,
    bench_linear_cross_entropy,
    bench_model,
)
from fastgpt.bench.formatting import UNTRUSTED, Row, comparison, doubts
from fastgpt.bench.machine import machine_line
from fastgpt.bench.measure import timed
from fastgpt.tokenizer import EncodingError

OPERATIONS = {
    "embedding": bench_embedding.CASES,
    "layer_norm": bench_layer_norm.CASES,
    "causal_attention": bench_causal_attention.CASES,
    "linear": bench_linear.CASES,
    "gelu": bench_gelu.CASES,
    "linear_cross_entropy": bench_linear_cross_entropy.CASES,
    "forward": bench_model.FORWARD,
    "train": bench_model.TRAIN,
    "decode": bench_model.DECODE,
    "batch": bench_model.BATCH,
    "score": bench_model.SCORE,
    "lookup": bench_model.LOOKUP,
    "invariance": bench_invariance.CASES,
}
NOTE = """\
The first: its time; the others: how many times as fast, by the medians of interleaved rounds. In
brackets the largest error against float64; of generated tokens, how far a chosen one's logit lies
below the greatest one, in float64."""


def main() -> int:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    known = ", ".join(OPERATIONS)
    top.add_argument("operation", nargs="*", help=f"some of {known} (default: all)")
    operations = top.parse_args().operation or list(OPERATIONS)
    if unknown := set(operations) - set(OPERATIONS):
        top.error(f"no benchmark of {', '.join(sorted(unknown))}, only of {known}")
    rows = []
    for operation in operations:
        rows += (of_one := list(measured(operation)))
        print(comparison(of_one, aligned=True), end="\n\n", flush=True)
    print(NOTE)
    if lines := doubts(rows):
        print("", UNTRUSTED, *lines, sep="\n")
    print(f"\n{machine_line()}")
    return 0


def measured(operation: str) -> Iterator[Row]:
    """A row for each case, once its results are checked."""
    left_out: dict[str, str] = {}
    for name, build in OPERATIONS[operation].items():
        print(name, file=sys.stderr, flush=True)
        torch.manual_seed(123)
        try:
            case = build()
        except EncodingError as error:
            print(f"  left out: {error}", file=sys.stderr, flush=True)
            continue
        case.check()
        figures, reasons = timed(case)
        for peer, reason in reasons.items():
            if left_out.get(peer) != reason:
                print(f"  without {peer}: {reason}", file=sys.stderr, flush=True)
        left_out |= reasons
        yield {"name": name, **figures}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
