"""What a measurement ran on: the line that stands beside every figure."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

from fastgpt import cpu, dispatch
from fastgpt._version import __version__


def cpu_name() -> str:
    """The processor's name as its maker writes it, or the architecture where nothing tells."""
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


def machine() -> dict[str, str | int | None]:
    """Backend in force for float32 on the CPU, instruction set, threads, versions and processor."""
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
    """`machine()` for people, in one line."""
    m = machine()
    backend = f"{m['backend']} ({m['isa']})" if m["isa"] else m["backend"]
    threads = "1 thread" if m["threads"] == 1 else f"{m['threads']} threads"
    return (
        f"backend {backend}, {threads}, fastgpt {m['fastgpt']}, torch {m['torch']}, "
        f"Python {m['python']}, {m['cpu']}, {m['system']}"
    )
