"""The peak memory of a peer at a piece of work, in a process of its own.

`python -m fastgpt.bench.memory` is that process. It prints the most bytes that it held, above what
it held before the model was made.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import torch

from fastgpt.bench.workloads import Models, Work

WEIGHED = ("reference", "torch", "hf", "fastgpt", "loss")
TIMEOUT = 900  # seconds


def peak_memory(work: Work, peer: str, threads: int) -> int | str:
    """The peak in bytes, or why it is not known."""
    spec = json.dumps(dataclasses.asdict(work))
    command = [sys.executable, "-m", "fastgpt.bench.memory", spec, peer, str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT} seconds"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {done.returncode}"
    return int(done.stdout)


def peak() -> int:
    """The most bytes that this process has held; 0 if nothing tells.

    On Linux ru_maxrss includes the parent's peak, so /proc comes first.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def main() -> int:
    top = argparse.ArgumentParser(prog="python -m fastgpt.bench.memory", description=__doc__)
    top.add_argument("work", type=json.loads)
    top.add_argument("peer", choices=WEIGHED)
    top.add_argument("threads", type=int)
    args = top.parse_args()
    torch.set_num_threads(args.threads)
    work = Work(**args.work)
    models = Models(work.cfg, alone=True)
    if args.peer == "hf":
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    before = peak()
    if not before:
        print("this system does not report a process's peak memory", file=sys.stderr)
        return 1
    run = work.peers(models)[args.peer]
    with torch.set_grad_enabled(work.kind == "train"):
        for _ in range(2):  # so that what the first keeps counts
            run()
            models.train(work.kind == "train")
    print(peak() - before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
