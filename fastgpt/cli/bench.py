"""`fastgpt bench`: our model and its peers on this machine, as a report with charts."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt.atomic_files import whole_file
from fastgpt.bench import measure, rule, workloads
from fastgpt.bench.formatting import UNTRUSTED, doubts
from fastgpt.bench.peers import ENGINES, PRECISIONS, chosen
from fastgpt.cli.progress import add_options, measuring, need_rich
from fastgpt.cli.usage import Commands, UsageError

if TYPE_CHECKING:
    from fastgpt.bench.charts import Chart

# With these peers --quick would take a minute rather than seconds.
SLOW = ("compile", "hf", "ct2", "onednn", "onnx", "llama", "openvino")


def add_to(commands: Commands) -> None:
    sub = commands.add_parser(
        "bench",
        help="measure fastgpt, the book and other libraries here, and write a report with charts",
        description="Time forward passes, training steps and generation of GPT-2 124M on the CPU: "
        "the book's model, fastgpt's at each precision, PyTorch's fused operations, torch.compile "
        "and, where installed, Hugging Face, CTranslate2, ONNX Runtime, llama.cpp and OpenVINO. "
        "Writes one HTML page, and the figures as JSON beside it. Exits with 1 if fastgpt's "
        "results are wrong.",
    )
    sub.add_argument(
        "--out", type=Path, default=Path("fastgpt-bench.html"), metavar="FILE", help="(%(default)s)"
    )
    sub.add_argument("--svg", type=Path, metavar="DIR", help="write the charts there, too")
    sub.add_argument(
        "--quick",
        action="store_true",
        help="a toy model, PyTorch's own peers, float32: takes seconds; then, in under a minute, "
        "whether auto takes what is fastest on this machine, in words for a report",
    )
    sub.add_argument(
        "--peers",
        type=_some_of("peer", ENGINES),
        metavar="NAME,...",
        help=f"only these, the book and fastgpt, of {', '.join(ENGINES)}",
    )
    sub.add_argument(
        "--precisions",
        type=_some_of("precision", PRECISIONS),
        metavar="NAME,...",
        help=f"only these and the book, of {', '.join(PRECISIONS)}",
    )
    add_options(sub)
    sub.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="JSON",
        help="measure nothing, draw the figures of an earlier run",
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
        lines, agree = doubts(document["works"]), document["agree"]
    except Exception as error:  # of any kind: the figures may be anything
        if not args.source:
            raise
        raise UsageError(f"{args.source} contains no figures of this version: {error!r}") from None
    _write(args, document, pictures, html)
    if lines:
        print(UNTRUSTED, *lines, sep="\n")
    return 0 if agree else 1


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    need_rich("the progress bar needs rich: pip install rich")
    folder = args.out.parent
    try:  # now, rather than after minutes
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} is not writable")
    engines = args.peers or [name for name in ENGINES if not (args.quick and name in SLOW)]
    precisions = args.precisions or PRECISIONS[: 1 if args.quick else None]
    peers = chosen(("fastgpt", *engines), precisions)
    with measuring(args.threads) as (show, _):
        works = workloads.QUICK if args.quick else workloads.FULL
        document = measure.measure(works, peers, rounds=args.rounds, progress=show)
        if args.quick:
            print(*rule.check().lines(), sep="\n")
    return document


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != measure.FORMAT:
        raise UsageError(f"{path} contains no figures of this version of fastgpt bench")
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
            with whole_file(path) as file:
                file.write(f"{text.rstrip()}\n".encode())
            print(path)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None


def _some_of(what: str, known: Collection[str]) -> Callable[[str], list[str]]:
    """The type of an option that takes names separated by commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := ", ".join(repr(name) for name in names if name not in known):
            message = f"unknown {what} {unknown}; known are {', '.join(known)}"
            raise argparse.ArgumentTypeError(message)
        return names

    return parse
