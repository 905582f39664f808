"""`python -m benchmarks.busy_cores`: the milliseconds of GPT-2 124M and of the book's model while
other programs keep cores busy, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from statistics import median

import torch

import fastgpt
from fastgpt.bench.cached_book import CachedBook
from fastgpt.bench.formatting import markdown
from fastgpt.bench.machine import machine_line
from fastgpt.bench.rounds import interleaved

SPIN = [sys.executable, "-c", "while True: pass"]


def main() -> int:
    top = argparse.ArgumentParser(prog="python -m benchmarks.busy_cores", description=__doc__)
    top.add_argument("--rounds", type=int, default=5, help="timed rounds (%(default)s)")
    rounds = top.parse_args().rounds
    cores = torch.get_num_threads()
    head = ["work", "busy programs", "the book", "fastgpt", "one thread", "times the book"]
    rows = []
    for name, peers in works():
        for programs in sorted({0, 1, cores, 2 * cores}):
            with busy(programs):
                interleaved(peers, 1)
                seconds = {peer: median(s) for peer, s in interleaved(peers, rounds).items()}
            cells = [f"{seconds[peer] * 1e3:.0f}" for peer in peers]
            ratio = seconds["book"] / seconds["fastgpt"]
            rows.append([name, str(programs), *cells, f"{ratio:.2f}"])
            print(*rows[-1], file=sys.stderr, flush=True)
    print(f"\n{markdown(head, rows)}\n\n{machine_line()}")
    return 0


def works() -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """Each piece of work by the book's model, by fastgpt, and by fastgpt on one thread."""
    torch.manual_seed(123)
    model = fastgpt.GPTModel(fastgpt.GPT_CONFIG_124M).eval()
    book = fastgpt.reference.GPTModel(fastgpt.GPT_CONFIG_124M).eval()
    book.load_state_dict(model.state_dict())
    cached, vocabulary = CachedBook(book), fastgpt.GPT_CONFIG_124M["vocab_size"]

    def greedy(ids: torch.Tensor, new: int) -> object:
        return fastgpt.generate(model, ids, new, 1024, prompt_lookup=False)

    for shape in ((1, 128), (8, 128)):
        ids = torch.randint(vocabulary, shape)
        yield (
            f"forward {list(shape)}",
            _peers(lambda ids=ids: book(ids), lambda ids=ids: model(ids)),
        )
    ids = torch.randint(vocabulary, (1, 32))
    yield "decode [1, 32] + 16", _peers(lambda: cached.generate(ids, 16), lambda: greedy(ids, 16))


def _peers(
    book: Callable[[], object], ours: Callable[[], object]
) -> dict[str, Callable[[], object]]:
    threads = torch.get_num_threads()

    @torch.no_grad()
    def alone() -> object:
        torch.set_num_threads(1)
        try:
            return ours()
        finally:
            torch.set_num_threads(threads)

    return {"book": torch.no_grad()(book), "fastgpt": torch.no_grad()(ours), "one thread": alone}


@contextlib.contextmanager
def busy(programs: int) -> Iterator[None]:
    """So many programs that each keep a core busy."""
    running = [subprocess.Popen(SPIN) for _ in range(programs)]
    try:
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
