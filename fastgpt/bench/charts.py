"""The charts of a report, as SVG, from the document of `measure`. Needs matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fastgpt.bench.formatting import KINDS, UNTRUSTED, Row, doubts, kind, mark, size
from fastgpt.bench.peers import ENGINES, PEERS, PRECISIONS

# How bars are hatched and dots are shaped; the colour is the engine's.
HATCHES = dict(zip(PRECISIONS, ("", "//////", "......", "xxxxxx", "------"), strict=True))
MARKERS = dict(zip(PRECISIONS, "os^vD", strict=True))
INK, FAINT = "#212529", "#dee2e6"
WIDTH = 8.4  # inches
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


class Chart(NamedTuple):
    """One picture."""

    name: str
    title: str
    caption: str
    svg: str


class Panel(NamedTuple):
    """Rows that share an axis."""

    title: str
    rows: list[Row]


def charts(document: dict[str, Any]) -> list[Chart]:
    """The charts of what the document holds."""
    drawn = []
    with rc_context(STYLE):
        for name, title, key, draw in CHARTS:
            rows = [r for r in document["works"] if any(p.get(key) for p in r["peers"].values())]
            if rows:
                drawn.append(Chart(name, title, *draw(rows, key)))
    return drawn


def panels(works: Iterable[Row]) -> list[Panel]:
    """The rows by kind, each kind with its heading."""
    rows = list(works)
    found = [Panel(title, [r for r in rows if kind(r) == which]) for which, title in KINDS.items()]
    return [panel for panel in found if panel.rows]


def _speed(rows: Sequence[Row], key: str) -> tuple[str, str]:
    def draw(axes: Axes, panel: Panel) -> None:
        longest = _bars(axes, panel.rows, key, lambda value: f"{value:.2f}")
        _bounds(axes, panel.rows)
        axes.set_xlim(0, 1.12 * max(longest, *(_bound_of(row) for row in panel.rows)))
        axes.axvline(1, color=INK, linewidth=0.8, zorder=3)
        axes.set_xlabel(f"times as fast as {PEERS[panel.rows[0]['base']].label}", fontsize=8)

    caption = (
        "Longer is faster; whiskers are the quartiles of the rounds. No float32 code can beat the "
        "bound on this machine: its peak of multiply-adds, or every weight read once a pass."
    )
    if doubts(rows):
        caption += f" {UNTRUSTED}"
    return caption, _stacked(panels(rows), draw, key)


def _bound(rows: Sequence[Row], key: str) -> tuple[str, str]:
    def draw(axes: Axes) -> None:
        _dots(axes, rows, lambda peer: 100 * (peer[key] or 0))
        marks = [max(mark(row, name) for name in row["peers"]) for row in rows]
        names = [tick.get_text() for tick in axes.get_yticklabels()]
        axes.set_yticks(range(len(rows)), [a + b for a, b in zip(names, marks, strict=True)])
        axes.axvline(100, color=INK, linewidth=1.2, zorder=1)
        axes.set_xlim(left=0)
        axes.set_xlabel("per cent of the bound's speed", fontsize=8)

    caption = (
        "At 100 per cent the processor does nothing but multiply-adds at its measured peak, or "
        "reads weights at the measured bandwidth of memory. More than that is noise."
    )
    return caption, _single(rows, draw, key)


def _memory(rows: Sequence[Row], key: str) -> tuple[str, str]:
    def draw(axes: Axes, panel: Panel) -> None:
        longest = _bars(axes, panel.rows, key, lambda value: f"{value:,.0f}", 2**-20)
        axes.set_xlim(0, 1.12 * longest)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("MiB at the peak", fontsize=8)

    caption = (
        "Shorter is better. The most memory that a process of its own held, above what it held "
        "before the model was made: weights, activations, gradients."
    )
    return caption, _stacked(panels(rows), draw, key)


def _error(rows: Sequence[Row], key: str) -> tuple[str, str]:
    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        _dots(axes, rows, lambda peer: peer[key] or None)
        axes.set_xlabel("largest absolute error against float64", fontsize=8)

    caption = (
        "Further left is more exact. A forward pass: the error of the logits; a training step: "
        "that of the loss and every gradient, without dropout; scores: that of the "
        "log-probabilities. An error of 0 is not drawn, nor is a step that is too large to repeat "
        "in float64."
    )
    return caption, _single(rows, draw, key)


CHARTS = (  # name, title, the peers' figure, and what draws it and returns a caption and the SVG
    ("speed", "Speed", "speed_up", _speed),
    ("bound", "Share of the bound", "share_of_bound", _bound),
    ("memory", "Memory", "memory", _memory),
    ("error", "Error", "error", _error),
)


def _bars(
    axes: Axes, rows: Sequence[Row], key: str, label: Callable[[float], str], scale: float = 1
) -> float:
    """Draw a group of labelled bars for each row; return the largest value, whiskers included."""
    position, ticks, longest = 0.0, [], 0.0
    for row in rows:
        peers = {name: p for name, p in row["peers"].items() if p.get(key)}
        start = position
        for name, peer in peers.items():
            value = scale * peer[key]
            engine, precision = PEERS[name]
            axes.barh(position, value, 0.82, zorder=2, **_filled(ENGINES[engine].colour, precision))
            ends, text = (value, value), label(value)
            if key == "speed_up":
                text += mark(row, name)
                ends = tuple(value * peer["seconds"] / q for q in reversed(peer["quartiles"]))
                axes.plot(ends, (position, position), color=INK, linewidth=0.8, zorder=4)
            axes.annotate(
                text,
                (ends[1], position),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                fontweight="bold" if PEERS[name].is_ours else "normal",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                zorder=5,
            )
            longest = max(longest, ends[1])
            position += 1
        ticks.append(((start + position - 1) / 2, size(row)))
        position += 0.7
    _rows_axis(axes, ticks)
    axes.set_ylim(position - 1.0, -0.7)
    return longest


def _filled(colour: str, precision: str) -> dict[str, Any]:
    """How a bar looks."""
    return {"facecolor": colour, "hatch": HATCHES[precision], "edgecolor": "white", "linewidth": 0}


def _bound_of(row: Row) -> float:
    seconds: float = row["peers"][row["base"]]["seconds"]
    return seconds / row["bound"] if row["bound"] else 0.0


def _bounds(axes: Axes, rows: Sequence[Row]) -> None:
    """A dashed line across the float32 peers of each group where their bound stands."""
    position = 0.0
    for row in rows:
        count = len(row["peers"])
        if at := _bound_of(row):
            float32 = sum(PEERS[name].is_float32 for name in row["peers"])  # which come first
            ends = (position - 0.5, position + float32 - 0.5)
            axes.plot((at, at), ends, "--", color=INK, linewidth=1.1, zorder=3)
        position += count + 0.7


def _dots(axes: Axes, rows: Sequence[Row], value: Callable[[Row], float | None]) -> None:
    for position, row in enumerate(rows):
        axes.axhline(position, color=FAINT, linewidth=0.8, zorder=0)
        for name, peer in row["peers"].items():
            at = value(peer)
            if at:
                known, larger = PEERS[name], 8 if PEERS[name].is_ours else 6
                colour, shape = ENGINES[known.engine].colour, MARKERS[known.precision]
                axes.plot(at, position, shape, color=colour, markersize=larger)
    _rows_axis(axes, [(i, row["name"].replace(" GPT-2", "")) for i, row in enumerate(rows)])
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _rows_axis(axes: Axes, ticks: Sequence[tuple[float, str]]) -> None:
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)


def _stacked(shown: Sequence[Panel], draw: Callable[[Axes, Panel], None], key: str) -> str:
    """The panels one below the other, each as high as its bars need."""
    heights = [0.75 + sum(0.19 * len(row["peers"]) + 0.1 for row in p.rows) for p in shown]
    layout = ConstrainedLayoutEngine(h_pad=0.09)
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout=layout)
    grid = figure.subplots(len(shown), squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(grid, shown, strict=True):
        draw(axes, panel)
        axes.set_title(_titled(panel), loc="left", fontsize=10, fontweight="bold")
    return _svg(figure, [row for panel in shown for row in panel.rows], key)


def _single(rows: Sequence[Row], draw: Callable[[Axes], None], key: str) -> str:
    figure = Figure(figsize=(WIDTH, 0.34 * len(rows) + 1.2), layout="constrained")
    draw(figure.subplots())
    return _svg(figure, rows, key, dots=True)


def _titled(panel: Panel) -> str:
    return f"{panel.title} ({', '.join(dict.fromkeys(row['config'] for row in panel.rows))})"


def _svg(figure: Figure, rows: Sequence[Row], key: str, dots: bool = False) -> str:
    """The figure under a legend of the peers that have `key`, without the ids that would clash with
    other pictures on a page.
    """
    used = {PEERS[name] for row in rows for name, peer in row["peers"].items() if peer.get(key)}
    labels = [name for name in ENGINES if any(peer.engine == name for peer in used)]
    handles: list[Artist] = [Patch(color=ENGINES[name].colour) for name in labels]
    labels = [ENGINES[name].label for name in labels]
    for precision in PRECISIONS[1:]:
        if any(peer.precision == precision for peer in used):
            labels.append(precision)
            dot = Line2D((), (), color=INK, marker=MARKERS[precision], linestyle="")
            handles.append(dot if dots else Patch(**_filled(INK, precision)))
    if key == "speed_up" and any(map(_bound_of, rows)):
        handles.append(Line2D((), (), linestyle="--", color=INK, linewidth=1.1))
        labels.append("bound")
    figure.legend(
        handles=handles,
        labels=labels,
        loc="outside upper left",
        ncols=4,
        frameon=False,
        handlelength=1.2,
    )
    file = io.StringIO()
    with rc_context({"svg.hashsalt": "fastgpt"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    referred = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    return re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in referred else "", text)
