"""The report as one HTML page that needs nothing else, from the document of `measure`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from fastgpt.bench.charts import Chart
from fastgpt.bench.formatting import (
    UNTRUSTED,
    Row,
    count_of_threads,
    doubts,
    kind,
    mark,
    percent,
    quality_table,
    readable,
    span,
)
from fastgpt.bench.peers import PEERS

TILES = (  # kind, peer, what the ratio is of
    (("forward", False), "fastgpt", "the book's speed, in a forward pass"),
    (("train", False), "fastgpt", "the book's speed, in a training step by the book's loop"),
    (("train", False), "loss", "the book's speed, in a training step by model.loss"),
    (("decode", True), "fastgpt", "the speed of the book's own loop, in generation"),
    (("decode", False), "fastgpt", "the speed of the book with a cache, in generation"),
    (("batch", False), "fastgpt", "the speed of one prompt after another, in generation"),
    (("score", False), "fastgpt", "the book's speed, in scoring texts"),
)


def page(document: dict[str, Any], charts: Sequence[Chart]) -> str:
    """The page, with these charts in it."""
    works, machine = document["works"], document["machine"]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("fastgpt.bench").joinpath("page.html").read_text(encoding="utf-8")
    )
    return template.render(
        machine=machine,
        threads=count_of_threads(machine["threads"]),
        date=document["date"],
        faults=[f"{row['name']}: {row['fault']}" for row in works if row["fault"]],
        untrusted=UNTRUSTED,
        doubts=doubts(works),
        tiles=[*_speed_tiles(works), *_error_tile(works)],
        charts=charts,
        rows=[{**row, "peers": list(_peers(row))} for row in works],
        left_out=[(PEERS[peer].label, why) for peer, why in document["left_out"].items()],
        quality=quality_table(document.get("quality", ())),
        facts=[*((n, "none" if v is None else v) for n, v in machine.items()), *_peaks(document)],
    )


def _peaks(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    peaks = document["peaks"]
    if peaks is None:
        yield "bound", "not measured: it takes the C++ extension"
    else:
        yield "multiply-adds", f"at most {peaks['flops'] / 1e9:,.0f} GFLOP/s"
        yield "memory", f"at most {peaks['bandwidth'] / 1e9:,.0f} GB/s read"


def _speed_tiles(works: Sequence[Row]) -> Iterator[dict[str, str]]:
    for which, peer, text in TILES:
        rows = [row for row in works if kind(row) == which and peer in row["peers"]]
        if rows:
            value = span([row["peers"][peer]["speed_up"] for row in rows])
            yield {"value": value + max(mark(row, peer) for row in rows), "text": text}


def _error_tile(works: Sequence[Row]) -> Iterator[dict[str, str]]:
    apart = [
        row["peers"]["fastgpt"]["error"] / row["peers"]["reference"]["error"]
        for row in works
        if row["base"] == "reference"
        and "fastgpt" in row["peers"]
        and row["peers"]["fastgpt"]["error"] is not None
        and row["peers"]["reference"]["error"]
    ]
    if apart:
        yield {"value": span(apart), "text": "the book's own error against float64"}


def _peers(row: Row) -> Iterator[dict[str, Any]]:
    for name, peer in row["peers"].items():
        bound, memory = peer.get("share_of_bound"), peer.get("memory")
        errors = (peer.get(key) for key in ("error", "kl_mean", "kl_largest"))
        yield {
            "label": PEERS[name].label,
            "ours": PEERS[name].is_ours,
            "cells": [
                readable(peer["seconds"]),
                f"{peer['tokens_per_second']:,.0f}",
                f"{peer['speed_up']:.2f}x{mark(row, name)}",
                percent(bound),
                *("" if error is None else f"{error:.1e}" for error in errors),
                "" if memory is None else f"{memory / 2**20:,.0f} MiB",
            ],
        }
