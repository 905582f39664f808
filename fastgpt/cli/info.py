"""`fastgpt info`: what this machine has, what is missing and why; for bug reports."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import warnings
from typing import Any

import torch

from fastgpt import cpu, triton
from fastgpt._distribution import conflict
from fastgpt.bench.machine import machine
from fastgpt.cli.usage import Commands, UsageError
from fastgpt.dispatch import BackendWarning, backends, requested

# Optional packages, and what each is for.
OPTIONAL = {
    "triton": "GPU kernels",
    "rich": "tables and progress bars",
    "safetensors": "training, and loading models",
    "huggingface_hub": "loading models from the Hugging Face Hub",
    "matplotlib": "the plot of a run's losses, and the charts of bench",
    "jinja2": "the report of bench",
}


def add_to(commands: Commands) -> None:
    sub = commands.add_parser(
        "info",
        help="print backends, versions and what is missing",
        description="Print backends, instruction sets, versions, threads, devices, and what is "
        "missing and why.",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON document")
    sub.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> int:
    try:
        requested()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BackendWarning)  # "missing" has the same reason
            facts = collect()
    except ValueError as error:  # FASTGPT_BACKEND or FASTGPT_CPU_ISA has an unknown value
        raise UsageError(error) from None
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for title, part in facts.items():
        print(f"{title}:")
        for name, value in part.items():
            print(f"  {name:<22} {value}")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Everything that is printed, by heading."""
    versions = {name: _version(name) for name in ("tiktoken", "numpy", *OPTIONAL)}
    missing = {
        name: f"{use}: pip install {name}"
        for name, use in OPTIONAL.items()
        if versions[name] is None
    }
    if said := conflict():
        missing["fastgpt"] = said
    if versions["triton"] is None:
        missing["triton"] = f"{OPTIONAL['triton']}: {triton.how_to_install()}"
    for row in backends().values():
        if not row.available:
            missing[f"backend {row.name}"] = row.reason or "not available"
    found = {
        f"backend {row.name}": f"{'yes' if row.available else 'no'}: {row.detail}"
        for row in backends().values()
    }
    has_extension = cpu.missing_reason() is None
    return {
        "machine": machine(),
        "backends": found,
        "instruction sets": {
            "active": cpu.isa() if has_extension else None,
            "available": ", ".join(cpu.isas()) if has_extension else None,
        },
        "versions": {name: version or "missing" for name, version in versions.items()},
        "devices": _devices(),
        "processes": _transports(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("FASTGPT_") or name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        },
        "missing": missing,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # From a distribution of another name, such as triton-windows.
        others = importlib.metadata.packages_distributions().get(name, [])
        return next((f"{importlib.metadata.version(n)} ({n})" for n in others if n != name), None)


def _devices() -> dict[str, str]:
    if torch.cuda.is_available():
        return {
            f"cuda:{number}": f"{p.name}, {p.total_memory / 2**30:.0f} GiB, {p.major}.{p.minor}"
            for number in range(torch.cuda.device_count())
            if (p := torch.cuda.get_device_properties(number))
        }
    built = torch.version.cuda or torch.version.hip
    why = "PyTorch finds no GPU" if built else "this PyTorch is built for CPUs only"
    return {"mps": "yes"} if torch.backends.mps.is_available() else {"cuda": f"no: {why}"}


def _transports() -> dict[str, str]:
    dist = torch.distributed
    if not dist.is_available():
        return {"torch.distributed": "no"}
    found = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return {name: "yes" if has else "no" for name, has in found.items()}
