"""How results are named and written: numbers, tables, and what cannot be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from fastgpt.bench.peers import PEERS

KINDS = {  # kind, and whether the reference is the book's own loop
    ("forward", False): "Forward pass",
    ("train", False): "Training step, forward and backward",
    ("decode", True): "Generation, against the book's own loop",
    ("decode", False): "Generation, against the book's model with a cache",
    ("batch", False): "Generation, prompts of different lengths",
    ("lookup", False): "Generation by guesses",
    ("score", False): "Scores of texts of different lengths",
}

UNTRUSTED = (
    "Figures with a question mark cannot be trusted: other programs kept the machine busy, or its "
    "speed changed. Measure again while nothing else runs."
)

Row = dict[str, Any]  # of the document's works, or `measure.timed` with a name


def kind(row: Row) -> tuple[str, bool]:
    """A row's key in KINDS."""
    return row["kind"], row["uncached"]


def size(row: Row) -> str:
    """A row's batch, tokens and new tokens, after the model's name if it is not GPT-2 124M."""
    model = "" if row["config"] == "GPT-2 124M" else f"{row['config']} "
    return f"{model}{row['size']}"


def readable(seconds: float) -> str:
    """A time in a suitable unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def percent(share: float | None) -> str:
    """A share in per cent; a dash for None."""
    return "-" if share is None else f"{share:.0%}"


def count_of_threads(threads: int) -> str:
    """A number of threads in words."""
    return "1 thread" if threads == 1 else f"{threads} threads"


def finite(value: Any) -> Any:
    """None in place of NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], aligned: bool = False) -> str:
    """A table in Markdown, its columns of equal width if `aligned`."""
    lines = [head, ["---"] * len(head), *rows]
    widths = [max(map(len, column)) if aligned else 0 for column in zip(*lines, strict=True)]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def comparison(rows: Sequence[Row], aligned: bool = False) -> str:
    """A table with a column for each piece of work: the time of its base, the speed-up of every
    other peer and of the bound over it, and the errors in brackets. Where distributions of next
    tokens were compared, the worst of them follow.
    """
    kl = any("kl_mean" in peer for row in rows for peer in row["peers"].values())
    head = ["", *(row["name"] for row in rows), *(["KL, mean", "KL, largest"] if kl else ())]
    lines = [
        [peer.label, *(_cell(row, name) for row in rows), *(_divergences(rows, name) if kl else ())]
        for name, peer in PEERS.items()
        if any(name in row["peers"] for row in rows)
    ]
    if any(row.get("bound") for row in rows):
        lines.append(["bound", *map(_bound, rows), *("--" if kl else "")])
    return markdown(head, lines, aligned)


def _divergences(rows: Sequence[Row], name: str) -> Iterator[str]:
    for key in ("kl_mean", "kl_largest"):
        peers = (row["peers"].get(name, {}) for row in rows)
        found = [peer[key] for peer in peers if peer.get(key) is not None]
        yield f"{max(found):.1e}" if found else "-"


def _cell(row: Row, name: str) -> str:
    if name not in row["peers"]:
        return "-"
    peer = row["peers"][name]
    text = readable(peer["seconds"]) if name == row["base"] else f"{peer['speed_up']:.2f}x"
    text += mark(row, name)
    text = f"**{text}**" if PEERS[name].is_ours else text
    return text if peer["error"] is None else f"{text} ({peer['error']:.1e})"


def _bound(row: Row) -> str:
    seconds = row["peers"][row["base"]]["seconds"]
    return "-" if row["bound"] is None else f"{seconds / row['bound']:.2f}x{mark(row, row['base'])}"


def quality_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of what each precision costs on real text."""
    head = ["precision", "perplexity", "change", "KL, mean", "KL, largest"]
    lines = [
        [
            row["precision"],
            f"{row['perplexity']:.4f}",
            f"{row['change']:+.3%}",
            f"{row['kl_mean']:.1e}",
            f"{row['kl_largest']:.1e}",
        ]
        for row in rows
    ]
    return head, lines


def doubts(rows: Sequence[Row]) -> list[str]:
    """What cannot be trusted, and why: a line for each row that has something."""
    lines = []
    for row in rows:
        peers = row["peers"].items()
        apart = [f"{PEERS[name].label}: {peer['doubt']}" for name, peer in peers if peer["doubt"]]
        if reasons := [row["doubt"]] if row["doubt"] else apart:
            lines.append(f"{row['name']}: {'; '.join(reasons)}")
    return lines


def mark(row: Row, peer: str) -> str:
    """What follows a peer's figure: a question mark if it cannot be trusted. A ratio needs the
    time of the base too.
    """
    apart = (row["peers"][name]["doubt"] for name in (peer, row["base"]))
    return " ?" if row["doubt"] or any(apart) else ""


def span(values: Sequence[float]) -> str:
    """The least and the greatest of some ratios."""
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return f"{low}x" if low == high else f"{low} to {high}x"
