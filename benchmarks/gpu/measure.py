"""Time, memory and the machine of the GPU script, and its limit of time."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import signal
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from fastgpt.bench import rounds

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
    """A section ran out of time. It is no Exception, so that nothing on the way takes it for a
    fault of its own.
    """


class Bench:
    """The device that the work runs on, whether it is a dry run, and the time that is left."""

    def __init__(self, device: str, budget: float) -> None:
        self.device, self.dry = torch.device(device), device == "cpu"
        self.budget, self.started = budget, time.monotonic()
        self.until = 1.0  # the share of the budget after which the current section must end
        self.peaks = {"bandwidth": 0.0, "flops": 0.0}  # measured by `measure_limits`

    def left(self) -> float:
        """Seconds that the current section still has."""
        return self.until * self.budget - self.took()

    def took(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def seconds(self, work: Callable[[], Any], rep: int = 100) -> float:
        """The median time of a kernel's call on the GPU, over about `rep` milliseconds of calls
        after a warm-up. The cache is overwritten between calls. A dry run calls once.
        """
        if self.dry:
            return rounds.seconds_of(work)
        from triton.testing import do_bench

        return float(do_bench(work, warmup=25, rep=rep, return_mode="median")) / 1e3

    def seconds_of(self, work: Callable[[], Any], calls: int) -> float:
        """The median time of a few long calls with the host's part, after two to warm up; of fewer
        if they would take more than 5 seconds.
        """
        if self.dry:
            return rounds.seconds_of(work)
        rounds.seconds_of(work, self.device)
        calls = min(calls, int(5 / rounds.seconds_of(work, self.device)) + 1)
        return median(rounds.seconds_of(work, self.device) for _ in range(calls))

    def measure_limits(self) -> None:
        """Set the peaks: the bandwidth of a large copy and the rate of a large bfloat16 product."""
        size = 1 << (10 if self.dry else 29)
        block, side = torch.empty(size, device=self.device), 64 if self.dry else 8192
        other = torch.empty_like(block)
        self.peaks["bandwidth"] = 8 * size / self.seconds(lambda: other.copy_(block))
        a = torch.randn(side, side, device=self.device, dtype=torch.bfloat16)
        self.peaks["flops"] = 2 * side**3 / self.seconds(lambda: a @ a)

    @contextlib.contextmanager
    def peak_memory(self) -> Iterator[Callable[[], float | None]]:
        """Yields a function that returns the peak of allocated gigabytes; None in a dry run."""
        if not self.dry:
            gc.collect()  # earlier models may be in cycles
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield lambda: None if self.dry else torch.cuda.max_memory_allocated() / 1e9

    @contextlib.contextmanager
    def within_the_time(self) -> Iterator[None]:
        """Raises OutOfTimeError in the block when the section's time is up."""

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
        """The row with what the work adds to it, or with why the work failed."""
        try:
            with self.within_the_time():
                return row | work()
        except (Exception, OutOfTimeError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            return row | {"failed": f"{type(error).__name__}: {reason}"}

    def machine(self) -> dict[str, Any]:
        """The machine, the versions and the date."""
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
            "copy_bandwidth": self.peaks["bandwidth"],
            "product_rate": self.peaks["flops"],
        }
        peaks = [peak for name, peak in PEAKS.items() if name in about["device"]]
        return about | {"peak": peaks[0] if peaks else None}
