"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgpt.bench.formatting import markdown, percent, readable

Row = dict[str, Any]


def _check(row: Row) -> list[str]:
    verdict = "ok" if row.get("ok") else row.get("failed", "FAILED")
    errors = [f"{row[key]:.1e}" if key in row else "-" for key in ("error", "torch_error")]
    return [row["check"], row["dtype"], row["size"], *errors, verdict]


def _operation(row: Row, ours: dict[tuple[str, str], float]) -> list[str]:
    name = [row["operation"], row.get("pass", "-"), row.get("peer", "-")]
    if "seconds" not in row:
        return [*name, "-", "-", row["failed"]]
    base = ours.get((row["operation"], row["pass"]))
    ratio = "-" if base is None else f"{row['seconds'] / base:.2f}"
    return [*name, readable(row["seconds"]), percent(row["share_of_limit"]), ratio]


def _training(row: Row) -> list[str]:
    if "seconds" not in row:
        return [row["train"], "-", "-", "-", "-", row["failed"]]
    memory = "-" if row["gigabytes"] is None else f"{row['gigabytes']:.1f} GB"
    return [
        row["train"],
        f"[{row['batch']}, {row['tokens']}]",
        f"{row['tokens_per_second']:,.0f}",
        percent(row["share_of_peak"]),
        memory,
        f"{row['losses'][0]:.3f}, {row['losses'][1]:.3f}",
    ]


def _decoding(row: Row) -> list[str]:
    rate = f"{row['tokens_per_second']:,.0f}" if "seconds" in row else row["failed"]
    return [row["decode"], str(row["batch"]), f"{row['prompt']} + {row['new']}", rate]


def render(results: dict[str, Any]) -> str:
    """A heading with the machine, then a table for each section."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    ours = {
        (row["operation"], row["pass"]): row["seconds"]
        for row in results["operations"]
        if row.get("peer") == "fastgpt" and "seconds" in row
    }
    limits = f"{machine['copy_bandwidth'] / 1e12:.2f} TB/s copied, "
    limits += f"{machine['product_rate'] / 1e12:.0f} TFLOP/s in a bfloat16 product"
    note = "A dry run: the kernels were interpreted and the figures mean nothing.\n\n"

    def section(name: str, head: list[str], cells: Callable[[Row], list[str]]) -> str:
        rows = [cells(row) for row in results[name]]
        return f"{markdown(head, rows) if rows else 'Not asked for.'}\n"

    lines = [
        f"# {machine['device']}, {machine['date']}",
        "",
        f"{note if machine['dry_run'] else ''}{versions}; {limits}.",
        "",
        "## Checks",
        "",
        "The largest error against float64, relative to the largest element. Ours may be twice",
        "PyTorch's in the same dtype, and one rounding.",
        "",
        section("checks", ["what", "dtype", "size", "error", "PyTorch's", ""], _check),
        "## Operations",
        "",
        "The last column is the peer's time over fastgpt's: above 1, fastgpt is faster.",
        "",
        section(
            "operations",
            ["operation", "pass", "by", "time", "of PyTorch's copy or product", "over ours"],
            lambda row: _operation(row, ours),
        ),
        "## Training, GPT-2 124M in bfloat16, one step of AdamW",
        "",
        section(
            "training",
            ["by", "batch", "tokens/s", "of the peak", "memory", "loss: first, last"],
            _training,
        ),
        "## Greedy decoding, GPT-2 124M in bfloat16",
        "",
        section("decoding", ["by", "batch", "tokens", "tokens/s"], _decoding),
    ]
    return "\n".join(lines)
