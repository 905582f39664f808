"""`fastgpt compare`: the book's model and ours side by side, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from fastgpt import BackendWarning, use_backend
from fastgpt.bench.words import UNTRUSTED
from fastgpt.cli.progress import bar, need_rich, silent
from fastgpt.cli.usage import Commands, missing_kernels, positive, seed, threads
from fastgpt.compare import ERRORS_APART, PROMPT, PROMPT_IDS, Row, compare
from fastgpt.dispatch import NAMES
from fastgpt.machine import machine, machine_line
from fastgpt.tokenizer import EncodingError, gpt2_encoding


def add_to(commands: Commands) -> None:
    sub = commands.add_parser(
        "compare",
        help="time the book's model and fastgpt's on GPT-2 124M, and compare their outputs",
        description="Time the book's model and fastgpt's side by side on GPT-2 124M with the same "
        "random weights, and compare their outputs. Exits with 1 if they disagree.",
    )
    sub.add_argument(
        "--seed", type=seed, default=123, metavar="N", help="of the weights (%(default)s)"
    )
    sub.add_argument(
        "--rounds",
        type=positive,
        default=5,
        metavar="N",
        help="timed rounds, again if the machine is busy (%(default)s)",
    )
    sub.add_argument("--threads", type=threads, metavar="N", help="default: as many as torch uses")
    sub.add_argument("--backend", choices=NAMES, help="default: $FASTGPT_BACKEND, else auto")
    sub.add_argument("--json", action="store_true", help="print one JSON document, no table")
    sub.set_defaults(run=run_compare)


def run_compare(args: argparse.Namespace) -> int:
    if not args.json:
        need_rich("the table needs rich: pip install rich, or take --json")
    notes = sys.stderr if args.json else sys.stdout
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        prompt, tokenizer = gpt2_encoding().encode(PROMPT), "tiktoken"
    except EncodingError as error:
        prompt, tokenizer = list(PROMPT_IDS), "known ids"
        print(
            f"No gpt2 table for tiktoken ({error.reason}); using the prompt's known ids.",
            file=notes,
        )

    with warnings.catch_warnings(), use_backend(args.backend) if args.backend else nullcontext():
        # A BackendWarning would repeat what the line about missing kernels says.
        warnings.simplefilter("ignore", BackendWarning)
        missing = missing_kernels()
        if missing:
            print(f"No fused kernels, PyTorch's own operations stand in: {missing}", file=notes)
        measured_on, line = machine(), machine_line()
        options = {"seed": args.seed, "rounds": args.rounds}
        with nullcontext(silent) if args.json else bar() as show:
            rows = compare(prompt, **options, progress=show)

    agree = all(row.agree for row in rows)
    if args.json:
        document = {
            "command": "compare",
            "agree": agree,
            "prompt": {"text": PROMPT, "ids": prompt, "from": tokenizer},
            **options,
            "missing_kernels": missing,
            "machine": measured_on,
            "rows": [{k: _finite(v) for k, v in row.as_dict().items()} for row in rows],
        }
        print(json.dumps(document, indent=2))
    else:
        _print_table(rows, args.seed, line)
    return 0 if agree else 1


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(rows: Sequence[Row], seed: int, line: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"GPT-2 124M, float32, random weights (seed {seed}), prompt {PROMPT!r}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for header in ("seconds", "tokens/s", "speed-up", "largest\ndifference", "tolerance", "agree"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        if row.max_abs_difference is None:
            difference, tolerance = f"{row.same_tokens}/{row.tokens} same", ""
        else:
            difference, tolerance = f"{row.max_abs_difference:.1e}", f"{row.tolerance:.1e}"
        table.add_row(row.work)
        table.add_row(
            "  reference",
            f"{row.reference_seconds:.3f}",
            f"{row.reference_tokens_per_second:.0f}",
        )
        table.add_row(
            "  fastgpt",
            f"{row.fastgpt_seconds:.3f}",
            f"{row.fastgpt_tokens_per_second:.0f}",
            f"{row.speed_up:.2f}x" + (" ?" if row.doubt else ""),
            difference,
            tolerance,
            "yes" if row.agree else "NO",
            end_section=True,
        )
    console = Console(highlight=False)
    console.print(table)
    doubts = [f"{row.work}: {row.doubt}" for row in rows if row.doubt]
    for text in (
        *((UNTRUSTED, *doubts) if doubts else ()),
        f"Medians, models interleaved. Tolerance: {ERRORS_APART} x the reference's own largest "
        "error, measured in float64; fastgpt may err twice as much.",
        line,
    ):
        console.print(text, soft_wrap=True)
