"""Time, memory and the machine: what every figure of the GPU script rests on."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Dense bfloat16 operations a second, by the makers' data sheets.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "MI300X": 1307e12,
}


class OutOfTimeError(BaseException):
    """A section's time was used up before a piece of work was done; nothing on the way may take it
    for a fault of its own.
    """


class Bench:
    """Where the work runs, at what size, and what is left of the time."""

    def __init__(self, device: str, budget: float) -> None:
        self.device, self.dry = torch.device(device), device == "cpu"
        self.budget, self.started = budget, time.monotonic()
        self.until = 1.0  # the share of the budget after which the section at work has to end
        self.bandwidth = self.rate = 0.0  # measured by `measure_limits`

    def left(self) -> float:
        """Seconds that the section at work still has."""
        return self.until * self.budget - self.took()

    def took(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], rep: int = 100) -> float:
        """The median time of one call, over about `rep` milliseconds of calls after a warm-up.

        Between calls the GPU's cache is overwritten. A dry run calls once.
        """
        if self.dry:
            return _once(work)
        from triton.testing import do_bench

        return float(do_bench(work, warmup=25, rep=rep, return_mode="median")) / 1e3

    def seconds_of(self, work: Callable[[], Any], calls: int) -> float:
        """The median time of a few long calls after two to warm up, the host's part in it.

        Of calls so long that they would take more than 5 seconds there are fewer.
        """
        if self.dry:
            return _once(work)
        self._synchronized(work)
        calls = min(calls, int(5 / self._synchronized(work)) + 1)
        return statistics.median(self._synchronized(work) for _ in range(calls))

    def _synchronized(self, work: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def measure_limits(self) -> None:
        """Sets the bandwidth of a large copy and the rate of a large product in bfloat16."""
        size = 1 << (10 if self.dry else 29)
        block, side = torch.empty(size, device=self.device), 64 if self.dry else 8192
        other = torch.empty_like(block)
        self.bandwidth = 8 * size / self.seconds(lambda: other.copy_(block))
        a = torch.randn(side, side, device=self.device, dtype=torch.bfloat16)
        self.rate = 2 * side**3 / self.seconds(lambda: a @ a)

    def least_seconds(self, moved: float, operations: float) -> float:
        """What PyTorch's large copy or product takes for as many bytes or operations."""
        return max(moved / self.bandwidth, operations / self.rate)

    @contextlib.contextmanager
    def peak_memory(self) -> Iterator[Callable[[], float | None]]:
        """Yields a function that tells the most gigabytes allocated since; None in a dry run."""
        if not self.dry:
            gc.collect()  # what came before may be in cycles
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield lambda: None if self.dry else torch.cuda.max_memory_allocated() / 1e9

    @contextlib.contextmanager
    def within_the_time(self) -> Iterator[None]:
        """Raises OutOfTimeError inside once the section's time is used up."""

        def stop(*_: object) -> None:
            raise OutOfTimeError(f"more than {self.until:.0%} of the script's {self.budget:.0f} s")

        if self.left() <= 0:
            stop()
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.left())
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def attempt(self, row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row with what the work adds to it, or with why it did not come to an end."""
        try:
            with self.within_the_time():
                return row | work()
        except (Exception, OutOfTimeError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            return row | {"failed": f"{type(error).__name__}: {reason}"}

    def machine(self) -> dict[str, Any]:
        """What the figures were taken on, and when."""
        versions = {}
        for package in ("torch", "triton", "transformers", "liger-kernel"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        about: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "dry_run": self.dry,
            "device": "none (dry run)" if self.dry else torch.cuda.get_device_name(),
            "runtime": torch.version.hip or torch.version.cuda,
            "versions": versions,
            "copy_bandwidth": self.bandwidth,
            "product_rate": self.rate,
        }
        peaks = [peak for name, peak in PEAKS.items() if name in about["device"]]
        return about | {"peak": peaks[0] if peaks else None}


def _once(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
