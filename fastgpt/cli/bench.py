"""`fastgpt bench`: our model and its peers on this machine, as a report with charts."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastgpt import BackendWarning
from fastgpt.bench.words import UNTRUSTED, doubts
from fastgpt.cli.progress import bar, need_rich
from fastgpt.cli.usage import Commands, UsageError, missing_kernels, positive, threads

if TYPE_CHECKING:
    from fastgpt.bench.charts import Chart

# Beside fastgpt: without them --quick takes seconds, with them it compiles for a minute.
SLOW = ("compile", "hf", "ct2")


def add_to(commands: Commands) -> None:
    sub = commands.add_parser(
        "bench",
        help="measure fastgpt, the book and other libraries here, and write a report with charts",
        description="Time forward passes, training steps and generation of GPT-2 124M on the CPU: "
        "the book's model, fastgpt's, PyTorch's fused operations, torch.compile and, where "
        "installed, Hugging Face and CTranslate2. Writes one HTML page, and the figures as JSON "
        "beside it. Exits with 1 if fastgpt's results are off.",
    )
    sub.add_argument(
        "--out", type=Path, default=Path("fastgpt-bench.html"), metavar="FILE", help="(%(default)s)"
    )
    sub.add_argument("--svg", type=Path, metavar="DIR", help="put the charts there as files too")
    sub.add_argument(
        "--quick", action="store_true", help="a toy model, and only PyTorch's own peers: seconds"
    )
    sub.add_argument(
        "--peers", type=_peers, metavar="NAME,...", help="only these beside the book and fastgpt"
    )
    sub.add_argument(
        "--rounds", type=positive, default=5, metavar="N", help="at least (%(default)s)"
    )
    sub.add_argument("--threads", type=threads, metavar="N", help="default: as many as torch uses")
    sub.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="JSON",
        help="measure nothing; draw the figures of an earlier run",
    )
    sub.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    try:
        from fastgpt.bench.charts import charts
        from fastgpt.bench.page import page
    except ModuleNotFoundError as error:
        message = f"the report needs {error.name}: pip install jinja2 matplotlib rich"
        raise UsageError(message) from None
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {args.out} does not end in .html")
    document = _read(args.source) if args.source else _measure(args)
    try:
        pictures = charts(document)
        html = page(document, pictures)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if not args.source:
            raise
        raise UsageError(f"{args.source} holds no figures of this version: {error!r}") from None
    _write(args, document, pictures, html)
    if lines := doubts(document["works"]):
        print(UNTRUSTED, *lines, sep="\n")
    return 0 if document["agree"] else 1


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from fastgpt.bench.case import ALL_PEERS
    from fastgpt.bench.measure import measure
    from fastgpt.bench.works import FULL, QUICK

    need_rich("the progress bar needs rich: pip install rich")
    folder = args.out.parent
    try:  # now rather than after minutes
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} is not for you to write")
    if args.threads:
        torch.set_num_threads(args.threads)
    peers = [p for p in ALL_PEERS if not (args.quick and p in SLOW)]
    if args.peers:
        peers = ["fastgpt", *args.peers]
    with warnings.catch_warnings(), bar() as show:
        # The line about missing kernels says what a BackendWarning would.
        warnings.simplefilter("ignore", BackendWarning)
        if missing := missing_kernels():
            print(f"No fused kernels, PyTorch's own operations stand in: {missing}")
        return measure(QUICK if args.quick else FULL, peers, rounds=args.rounds, progress=show)


def _read(path: Path) -> dict[str, Any]:
    from fastgpt.bench.measure import FORMAT

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UsageError(f"{path} holds no figures of this version of fastgpt bench")
    return document


def _write(
    args: argparse.Namespace, document: dict[str, Any], pictures: list[Chart], html: str
) -> None:
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        files = {args.out: html, args.out.with_suffix(".json"): json.dumps(document, indent=1)}
        if args.svg:
            args.svg.mkdir(parents=True, exist_ok=True)
            files |= {args.svg / f"{chart.name}.svg": chart.svg for chart in pictures}
        for path, text in files.items():
            path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
            print(path)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None


def _peers(text: str) -> list[str]:
    from fastgpt.bench.case import ALL_PEERS

    names = text.split(",")
    if unknown := [name for name in names if name not in ALL_PEERS]:
        message = f"no peer {', '.join(map(repr, unknown))}; there are {', '.join(ALL_PEERS)}"
        raise argparse.ArgumentTypeError(message)
    return names
