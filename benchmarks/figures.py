"""`python -m benchmarks.figures FIGURES.json PAGE.md ...`: writes the figures of a `fastgpt bench`
into pages, between `<!-- figures: KIND -->` and `<!-- end of figures -->`.

KIND is a kind of work (forward, train, decode, batch, lookup, score), `quality`: what each
precision costs on real text, or `machine`: what they were measured on, and when.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastgpt.bench.formatting import KINDS as WORK_KINDS
from fastgpt.bench.formatting import (
    UNTRUSTED,
    comparison,
    count_of_threads,
    doubts,
    markdown,
    quality_table,
)
from fastgpt.bench.measure import FORMAT

REGION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def main() -> int:
    top = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    top.add_argument("document", type=Path)
    top.add_argument("pages", type=Path, nargs="+")
    args = top.parse_args()
    document = json.loads(args.document.read_text(encoding="utf-8"))
    if document.get("format") != FORMAT:
        top.error(f"{args.document} is of another version of fastgpt bench: run `make figures`")
    for page in args.pages:
        page.write_text(filled(page.read_text(encoding="utf-8"), document), encoding="utf-8")
        print(page)
    return 0


def filled(text: str, document: dict[str, Any]) -> str:
    """A page with these figures in its regions."""

    def write(region: re.Match[str]) -> str:
        kind = region[2]
        assert kind in KINDS, f"no figures of {kind!r}, only of {', '.join(KINDS)}"
        return f"{region[1]}{KINDS[kind](document)}\n{region[3]}"

    return REGION.sub(write, text)


def machine(document: dict[str, Any]) -> str:
    """What the figures were measured on, and when."""
    m = document["machine"]
    isa = f" ({m['isa']})" if m["isa"] else ""
    return (
        f"{m['cpu']}, {count_of_threads(m['threads'])}, backend {m['backend']}{isa}, "
        f"torch {m['torch']}, {document['date']}."
        + (f"\n{UNTRUSTED}" if doubts(document["works"]) else "")
    )


def quality(document: dict[str, Any]) -> str:
    """What each precision costs on real text."""
    return markdown(*quality_table(document.get("quality", ())))


def works_of(kind: str, document: dict[str, Any]) -> str:
    """The figures of a kind of work."""
    return comparison([row for row in document["works"] if row["kind"] == kind])


KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    **{kind: partial(works_of, kind) for kind in dict.fromkeys(kind for kind, _ in WORK_KINDS)},
    "quality": quality,
    "machine": machine,
}

if __name__ == "__main__":
    sys.exit(main())
