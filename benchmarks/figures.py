"""`python -m benchmarks.figures FIGURES.json PAGE.md ...`: writes the figures of a `fastgpt bench`
into pages, between `<!-- figures: KIND -->` and `<!-- end of figures -->`.

KIND is a kind of work (forward, train, decode), or `machine`: what they were measured on, and when.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from fastgpt.bench.case import ALL_PEERS
from fastgpt.bench.formatting import LABELS, UNTRUSTED, doubts, mark, readable
from fastgpt.bench.measure import FORMAT

REGION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
KINDS = ("forward", "train", "decode")


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
        assert kind in (*KINDS, "machine"), f"no figures of {kind!r}, only of {KINDS} and machine"
        lines = machine(document) if kind == "machine" else table(document, kind)
        return f"{region[1]}{lines}\n{region[3]}"

    return REGION.sub(write, text)


def table(document: dict[str, Any], kind: str) -> str:
    """The reference's time, the bound's and every other peer's speed-up over it, and in brackets
    the errors.
    """
    works = [row for row in document["works"] if row["kind"] == kind]
    peers = [p for p in ALL_PEERS if any(p in row["peers"] for row in works)]
    lines = [["", *(LABELS[peer] for peer in peers), "bound"], ["---"] * (2 + len(peers))]
    for row in works:
        lines.append([row["name"], *(_cell(row, peer) for peer in peers), _bound(row)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def machine(document: dict[str, Any]) -> str:
    """What the figures were measured on, and when."""
    m = document["machine"]
    isa = f" ({m['isa']})" if m["isa"] else ""
    threads = "1 thread" if m["threads"] == 1 else f"{m['threads']} threads"
    return (
        f"{m['cpu']}, {threads}, backend {m['backend']}{isa}, torch {m['torch']}, "
        f"{document['date']}." + (f"\n{UNTRUSTED}" if doubts(document["works"]) else "")
    )


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row["peers"]:
        return "-"
    peer = row["peers"][name]
    text = readable(peer["seconds"]) if name == "reference" else f"{peer['speed_up']:.2f}x"
    text += mark(row, name)
    text = f"**{text}**" if name in ("fastgpt", "loss") else text
    return text if peer["error"] is None else f"{text} ({peer['error']:.1e})"


def _bound(row: dict[str, Any]) -> str:
    seconds = row["peers"]["reference"]["seconds"]
    return "-" if row["bound"] is None else f"{seconds / row['bound']:.2f}x{mark(row, 'reference')}"


if __name__ == "__main__":
    sys.exit(main())
