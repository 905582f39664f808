"""How `pytest benchmarks` measures and prints: a group for each case, peers by their medians."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from fastgpt.bench.case import Case
from fastgpt.tokenizer import EncodingError


def pytest_configure(config: pytest.Config) -> None:
    """Defaults for what the command line does not set."""
    option = config.option
    option.benchmark_columns = option.benchmark_columns or ["median", "iqr", "ops"]
    if option.benchmark_sort == "min":
        option.benchmark_sort = "median"
    if float(option.benchmark_max_time) == 1.0:
        option.benchmark_max_time = "0.5"
    # torch.compile uses parts of torch that torch itself calls deprecated.
    config.addinivalue_line("filterwarnings", r"ignore::DeprecationWarning:torch\..*")


def pytest_benchmark_group_stats(benchmarks: list[dict], group_by: str) -> list | None:
    """Groups in the order of the cases; pytest-benchmark would put [1024] before [8]."""
    if group_by != "group":
        return None
    groups: dict[str, list[dict]] = {}
    for row in benchmarks:
        groups.setdefault(row["group"], []).append(row)
    return list(groups.items())


@lru_cache(maxsize=1)  # the peers of a case follow each other
def _built(build: Callable[[], Case]) -> Case:
    torch.manual_seed(123)
    return build()


@pytest.fixture
def measure(benchmark):
    """Check the result of one peer of a case, time it, and record its error."""

    def run(name: str, build: Callable[[], Case], peer: str) -> None:
        try:
            case = _built(build)
        except EncodingError as error:
            pytest.skip(str(error))
        benchmark.group, benchmark.name = name, peer
        if reason := case.why_not(peer):
            pytest.skip(reason)
        if peer == "fastgpt":
            case.check()
        benchmark.extra_info["max_abs_error"] = case.error(peer)
        with torch.no_grad():
            if case.rounds:
                benchmark.pedantic(case.peers[peer], rounds=case.rounds)
            else:
                benchmark(case.peers[peer])

    return run
