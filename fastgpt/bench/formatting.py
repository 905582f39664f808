"""How a report names things and writes figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LABELS = {
    "reference": "the book",
    "cached": "the book, with a cache",
    "torch": "PyTorch, fused by hand",
    "compile": "torch.compile",
    "hf": "Hugging Face",
    "ct2": "CTranslate2",
    "products": "products by PyTorch's library",
    "fastgpt": "fastgpt",
    "loss": "fastgpt, model.loss",
}
KINDS = {  # kind, and whether the reference is the book's own loop
    ("forward", False): "Forward pass",
    ("train", False): "Training step, forward and backward",
    ("decode", True): "Generation, against the book's own loop",
    ("decode", False): "Generation, against the book's model with a cache",
}

UNTRUSTED = (
    "What is marked with a question mark can't be trusted: the machine was busy with other "
    "programs, or its speed changed. Measure again while nothing else runs."
)

Row = dict[str, Any]  # of the document's works


def kind(row: Row) -> tuple[str, bool]:
    """A row's key in KINDS."""
    return row["kind"], row["uncached"]


def size(row: Row) -> str:
    """A row's batch, tokens and new tokens, behind the model's name where it is not GPT-2 124M."""
    batch, tokens, new = row["size"]
    model = "" if row["config"] == "GPT-2 124M" else f"{row['config']} "
    return f"{model}[{batch}, {tokens}]" + (f" + {new}" if new else "")


def readable(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def doubts(works: Sequence[Row]) -> list[str]:
    """What can't be trusted of a document's works, and why: a line each."""
    lines = []
    for row in works:
        peers = row["peers"].items()
        apart = [f"{LABELS[name]}: {peer['doubt']}" for name, peer in peers if peer["doubt"]]
        if reasons := [row["doubt"]] if row["doubt"] else apart:
            lines.append(f"{row['name']}: {'; '.join(reasons)}")
    return lines


def mark(row: Row, peer: str) -> str:
    """What stands behind a peer's figure: a question mark if it can't be trusted. A ratio needs the
    reference's time too.
    """
    apart = (row["peers"][name]["doubt"] for name in (peer, "reference"))
    return " ?" if row["doubt"] or any(apart) else ""


def span(values: Sequence[float]) -> str:
    """The least and the greatest of some ratios."""
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return f"{low}x" if low == high else f"{low} to {high}x"
