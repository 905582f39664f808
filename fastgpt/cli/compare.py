"""`fastgpt compare`: the book's model and ours side by side, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from fastgpt import use_backend
from fastgpt.bench.compare import ERRORS_APART, PROMPT, PROMPT_IDS, Row, compare
from fastgpt.bench.formatting import UNTRUSTED, finite
from fastgpt.bench.machine import machine, machine_line
from fastgpt.cli.progress import add_options, measuring, need_rich
from fastgpt.cli.usage import Commands, seed
from fastgpt.dispatch import NAMES
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
    add_options(sub)
    sub.add_argument("--backend", choices=NAMES, help="default: $FASTGPT_BACKEND, else auto")
    sub.add_argument("--json", action="store_true", help="print one JSON document, no table")
    sub.set_defaults(run=run_compare)


def run_compare(args: argparse.Namespace) -> int:
    if not args.json:
        need_rich("the table needs rich: pip install rich, or choose --json")
    try:
        prompt, tokenizer = gpt2_encoding().encode(PROMPT), "tiktoken"
    except EncodingError as error:
        prompt, tokenizer = list(PROMPT_IDS), "known ids"
        print(
            f"No gpt2 table for tiktoken ({error.reason}); using the prompt's known ids.",
            file=sys.stderr if args.json else sys.stdout,
        )
    options = {"seed": args.seed, "rounds": args.rounds}
    with (
        use_backend(args.backend) if args.backend else nullcontext(),
        measuring(args.threads, show_bar=not args.json) as (show, missing),
    ):
        measured_on, line = machine(), machine_line()
        rows = compare(prompt, **options, progress=show)

    agree = all(row["agree"] for row in rows)
    if args.json:
        document = {
            "command": "compare",
            "agree": agree,
            "prompt": {"text": PROMPT, "ids": prompt, "from": tokenizer},
            **options,
            "missing_kernels": missing,
            "machine": measured_on,
            "rows": [{k: finite(v) for k, v in row.items()} for row in rows],
        }
        print(json.dumps(document, indent=2))
    else:
        _print_table(rows, args.seed, line)
    return 0 if agree else 1


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
        difference = f"{row['same_tokens']}/{row['tokens']} same"
        if row["max_abs_difference"] is not None:
            difference = f"{row['max_abs_difference']:.1e}"
        table.add_row(row["work"])
        for name in ("reference", "fastgpt"):
            speeds = f"{row[f'{name}_seconds']:.3f}", f"{row[f'{name}_tokens_per_second']:.0f}"
            verdict = (
                f"{row['speed_up']:.2f}x" + (" ?" if row["doubt"] else ""),
                difference,
                "" if row["max_abs_difference"] is None else f"{row['tolerance']:.1e}",
                "yes" if row["agree"] else "NO",
            )
            ours = name == "fastgpt"
            table.add_row(f"  {name}", *speeds, *(verdict if ours else ()), end_section=ours)
    console = Console(highlight=False)
    console.print(table)
    doubts = [f"{row['work']}: {row['doubt']}" for row in rows if row["doubt"]]
    for text in (
        *((UNTRUSTED, *doubts) if doubts else ()),
        f"Medians of interleaved rounds. Tolerance: {ERRORS_APART} times the reference's own "
        "largest error, measured in float64; fastgpt may err twice as much.",
        line,
    ):
        console.print(text, soft_wrap=True)
