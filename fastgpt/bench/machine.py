"""The machine that a measurement ran on: the line beside every figure."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastgpt import cpu, dispatch
from fastgpt._version import __version__
from fastgpt.bench.formatting import count_of_threads


def cpu_name() -> str:
    """The processor's name as its maker writes it, or the architecture if nothing tells."""
    try:
        if platform.system() == "Linux":
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    return value.strip()
        elif platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """The current backend for float32 on the CPU, instruction set, threads, versions, processor."""
    backend = dispatch.choose("machine", torch.empty(0))
    return {
        "backend": backend,
        "isa": cpu.isa() if backend == "cpu" else None,
        "threads": torch.get_num_threads(),
        "fastgpt": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
    }


def machine_line() -> str:
    """`machine()` in one line, for people."""
    m = machine()
    backend = f"{m['backend']} ({m['isa']})" if m["isa"] else m["backend"]
    return (
        f"backend {backend}, {count_of_threads(m['threads'])}, fastgpt {m['fastgpt']}, "
        f"torch {m['torch']}, Python {m['python']}, {m['cpu']}, {m['system']}"
    )
