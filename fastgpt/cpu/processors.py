"""How many threads can run at once: a container may get a part of the machine's processors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def quota(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """The processors' worth of time that this process's control groups allow, rounded up.

    None where there is no limit, or no control groups. Reads the files of both versions of them
    (Linux's admin-guide/cgroup-v2 and scheduler/sched-bwc).
    """
    try:
        lines = os.fsdecode(groups.read_bytes()).splitlines()
    except OSError:
        return None
    limits = [limit for line in lines if line.count(":") > 1 for limit in _limits(line, root)]
    return max(1, math.ceil(min(limits))) if limits else None


def _limits(line: str, root: Path) -> Iterator[float]:
    """Those of one hierarchy's group and of the groups above it."""
    _, controllers, path = line.split(":", 2)
    if controllers and "cpu" not in controllers.split(","):
        return
    top = root / controllers
    group = top / path.lstrip("/")
    # Inside a container the path may be the host's: then the root is the container's own group.
    for folder in {top, *(f for f in (group, *group.parents) if f.is_relative_to(top))}:
        limit = _version_1(folder) if controllers else _version_2(folder)
        if limit is not None:
            yield limit


def _version_1(folder: Path) -> float | None:
    try:
        allowed = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return allowed / period if allowed > 0 and period > 0 else None


def _version_2(folder: Path) -> float | None:
    try:
        allowed, period = (folder / "cpu.max").read_text().split()
        return None if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
