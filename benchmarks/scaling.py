"""`python -m benchmarks.scaling --out FILE.svg`: how the time of a GPT-2 124M forward pass grows
with tokens, batch, layers and threads, as tables and, with --out, as a picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from fastgpt import GPT_CONFIG_124M, GPTModel
from fastgpt.bench.formatting import markdown
from fastgpt.bench.machine import machine_line
from fastgpt.bench.rounds import interleaved


class Panel(NamedTuple):
    """Seconds of a forward pass over one quantity, the others fixed."""

    quantity: str
    fixed: str
    values: tuple[int, ...]
    run: Callable[[int], Callable[[], object]]  # of a value


def main() -> int:
    top = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    top.add_argument("--out", type=Path, help="the picture, a file that ends in .svg or .png")
    top.add_argument("--rounds", type=int, default=7, help="timed rounds (%(default)s)")
    args = top.parse_args()
    measured = []
    for panel, seconds in measure(args.rounds):
        measured.append((panel, seconds))
        rows = zip(panel.values, seconds, strict=True)
        cells = [[str(value), f"{s * 1e3:.1f}", f"{s / seconds[0]:.2f}"] for value, s in rows]
        head = [f"{panel.quantity} ({panel.fixed})", "ms", "to the first"]
        print(f"\n{markdown(head, cells)}", flush=True)
    print(f"\n{machine_line()}")
    if args.out:
        draw(measured, args.out)
    return 0


def panels() -> Iterator[Panel]:
    """The four measurements. A panel's models live as long as it does."""
    threads = torch.get_num_threads()
    torch.manual_seed(123)
    model = GPTModel(GPT_CONFIG_124M).eval()

    def forward(batch: int, tokens: int, model=model) -> Callable[[], object]:
        ids = torch.randint(GPT_CONFIG_124M["vocab_size"], (batch, tokens))
        return lambda: model(ids)

    yield Panel("tokens", "batch 1", (64, 128, 256, 512, 1024), lambda n: forward(1, n))
    yield Panel("batch", "128 tokens", (1, 2, 4, 8), lambda n: forward(n, 128))

    def with_layers(n: int) -> Callable[[], object]:
        return forward(1, 256, GPTModel(GPT_CONFIG_124M | {"n_layers": n}).eval())

    yield Panel("layers", "[1, 256]", (1, 2, 4, 8, 12), with_layers)

    def with_threads(n: int) -> Callable[[], object]:
        run = forward(1, 1024)

        def on_threads() -> object:
            torch.set_num_threads(n)
            return run()

        return on_threads

    counts = tuple(dict.fromkeys((*(2**i for i in range(threads.bit_length())), threads)))
    yield Panel("threads", "[1, 1024]", counts, with_threads)
    torch.set_num_threads(threads)


@torch.no_grad()
def measure(rounds: int) -> Iterator[tuple[Panel, list[float]]]:
    """Each panel and its median seconds; its values take turns, after one round to warm up."""
    for panel in panels():
        runs = {str(value): panel.run(value) for value in panel.values}
        interleaved(runs, 1)
        yield panel, [median(times) for times in interleaved(runs, rounds).values()]


def draw(measured: list[tuple[Panel, list[float]]], out: Path) -> None:
    """Draw the panels side by side, and growth in proportion as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastgpt", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(measured), figsize=(11, 2.8), layout="constrained")
    for axis, (panel, seconds) in zip(axes, measured, strict=True):
        ms = [s * 1e3 for s in seconds]
        first, last = panel.values[0], panel.values[-1]
        if panel.quantity == "threads":
            guide = [ms[0] * first / value for value in panel.values]
        else:  # straight, but not through 0: some work does not depend on the quantity
            slope = (ms[-1] - ms[0]) / (last - first)
            guide = [ms[0] + slope * (value - first) for value in panel.values]
        axis.plot(panel.values, guide, "--", color="0.6", linewidth=1)
        axis.plot(panel.values, ms, "o-", color="tab:blue", markersize=4, linewidth=1.5)
        axis.set_title(panel.fixed, fontsize=9)
        axis.set_xlabel(panel.quantity)
        axis.set_xticks([v for v in panel.values if 4 * v >= last] if last > 12 else panel.values)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ms, forward pass")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
