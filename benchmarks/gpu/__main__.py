"""`python -m benchmarks.gpu`: see the package's docstring."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import table
from benchmarks.gpu.measure import Bench
from fastgpt import GPT_CONFIG_124M
from fastgpt.model import decode_graph
from fastgpt.triton import missing_reason, too_old

# By section, in their order, the share of the time after which it must end. Training comes last:
# its torch.compile takes all the time that is left.
UNTIL = {"checks": 0.35, "operations": 0.55, "decoding": 0.75, "training": 1.0}
SECTIONS = tuple(UNTIL)
SMALL = GPT_CONFIG_124M | {"vocab_size": 61, "context_length": 12, "emb_dim": 32, "n_heads": 2}


def main() -> int:
    """Run the sections asked for; 1 if a check or fastgpt failed, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("section", nargs="*", help=f"some of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder to write to")
    parser.add_argument("--budget", type=float, default=450, help="seconds that it may take")
    asked = parser.parse_args()
    if unknown := set(asked.section) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}, only {', '.join(SECTIONS)}")
    reason = missing_reason() or too_old()
    if reason is None and not asked.dry_run and not torch.cuda.is_available():
        reason = "torch finds no GPU"
    if reason is not None:
        print(f"Nothing was measured: {reason}. --dry-run needs no GPU.")
        return 2
    asked.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    with _interpreted() if asked.dry_run else contextlib.nullcontext():
        bench = Bench("cpu" if asked.dry_run else "cuda", asked.budget)
        for _ in run(bench, asked.section or SECTIONS, results):
            # After each row, so that a crash loses nothing that was measured.
            (asked.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            (asked.out / "table.md").write_text(table.render(results))
    print(table.render(results))
    own = [row for name in SECTIONS for row in results[name] if "fastgpt" in row.values()]
    failed = [row for row in own if "failed" in row]
    failed += [row for row in results["checks"] if not row.get("ok")]
    for row in failed:
        print(f"failed: {row}", file=sys.stderr)
    return 1 if failed else 0


def run(bench: Bench, sections: Collection[str], results: dict[str, Any]) -> Iterator[None]:
    """Puts the machine and the rows of each section into the results; yields after each row."""
    from benchmarks.gpu import checks, models, times  # which import triton

    cfg = GPT_CONFIG_124M | {"drop_rate": 0.0}
    if bench.dry:
        cfg = SMALL | {"drop_rate": 0.0, "n_layers": 2}
    bench.measure_limits()
    results |= {"machine": bench.machine(), **{name: [] for name in SECTIONS}}

    def checked() -> Iterator[dict[str, Any]]:
        yield from checks.operations(bench)
        yield from checks.models(bench, cfg)

    rows = {
        "checks": checked,
        "operations": lambda: times.operations(bench),
        "decoding": lambda: models.decoding(bench, cfg),
        "training": lambda: models.training(bench, cfg, results["machine"]["peak"]),
    }
    for name in [name for name in SECTIONS if name in sections]:
        bench.until = UNTIL[name] if len(sections) > 1 else 1.0
        for row in rows[name]():
            results[name].append(row)
            results["machine"]["took"] = bench.took()
            print(json.dumps(row), file=sys.stderr, flush=True)
            yield
    if "checks" in sections:
        bench.until = 1.0
        results["checks"].append(checks.bad_ids(bench, cfg))
        yield


def _interpreted() -> contextlib.AbstractContextManager[Any]:
    """The tests' interpreter, under which every kernel runs on CPU tensors. What would be captured
    in a CUDA graph is run again each time.
    """
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from on_triton.support.interpreter import interpreted

    def capture(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        result = run()
        return lambda: result.copy_(run()), result

    decode_graph.capture = capture
    return interpreted()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
