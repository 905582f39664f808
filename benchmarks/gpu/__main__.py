"""`python -m benchmarks.gpu`: see the package's docstring."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import table
from benchmarks.gpu.measure import Bench
from fastgpt import GPT_CONFIG_124M
from fastgpt.triton import missing_reason

SECTIONS = ("checks", "operations", "training", "decoding")
SMALL = GPT_CONFIG_124M | {"vocab_size": 61, "context_length": 12, "emb_dim": 32, "n_heads": 2}


def main() -> int:
    """Runs the sections asked for; 1 where a check or fastgpt failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("section", nargs="*", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder to write to")
    parser.add_argument("--budget", type=float, default=450, help="seconds that it may take")
    asked = parser.parse_args()
    if unknown := set(asked.section) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}, only {', '.join(SECTIONS)}")
    if (reason := missing_reason()) is None and not asked.dry_run and not torch.cuda.is_available():
        reason = "torch finds no GPU"
    if reason is not None:
        print(f"Nothing was measured: {reason}. --dry-run goes the same way without a GPU.")
        return 2
    with _interpreted() if asked.dry_run else contextlib.nullcontext():
        bench = Bench("cpu" if asked.dry_run else "cuda", asked.budget)
        results = run(bench, asked.section or SECTIONS)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table.render(results)
    (asked.out / "table.md").write_text(text)
    print(text)
    own = [row for name in SECTIONS for row in results[name] if "fastgpt" in row.values()]
    failed = [row for row in own if "failed" in row]
    failed += [row for row in results["checks"] if not row.get("ok")]
    for row in failed:
        print(f"failed: {row}", file=sys.stderr)
    return 1 if failed else 0


def run(bench: Bench, sections: Any) -> dict[str, Any]:
    """The machine, and the rows of each section."""
    from benchmarks.gpu import checks, models, times  # which import triton

    cfg = GPT_CONFIG_124M | {"drop_rate": 0.0}
    if bench.dry:
        cfg = SMALL | {"drop_rate": 0.0, "n_layers": 2}
    bench.measure_bounds()
    results: dict[str, Any] = {"machine": bench.machine(), **{name: [] for name in SECTIONS}}

    def checked() -> Iterator[dict[str, Any]]:
        yield from checks.operations(bench)
        yield from checks.models(bench, cfg)

    rows = {
        "checks": checked,
        "operations": lambda: times.operations(bench),
        "decoding": lambda: models.decoding(bench, cfg),
        "training": lambda: models.training(bench, cfg, results["machine"]["peak"]),
    }
    for name, produce in rows.items():  # training last: torch.compile may take all that is left
        if name in sections:
            for row in produce():
                results[name].append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    if "checks" in sections:
        results["checks"].append(checks.bad_ids(bench, cfg))
    results["machine"]["took"] = bench.budget - bench.left()
    return results


def _interpreted() -> contextlib.AbstractContextManager[Any]:
    """The tests' interpreter, under which every kernel runs on CPU tensors."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from on_triton.support.interpreter import interpreted

    return interpreted()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
