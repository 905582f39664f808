"""How many threads the C++ kernels use: no more than the processors that they may run on."""

import os
import subprocess
import sys

import pytest

import fastgpt
from fastgpt import cpu
from fastgpt.cpu.processors import quota

CPU = fastgpt.backends()["cpu"]


def groups(tmp_path, lines, files):
    (tmp_path / "cgroup").write_bytes(os.fsencode("\n".join(lines) + "\n"))
    for name, text in files.items():
        path = tmp_path / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return quota(tmp_path / "cgroup", tmp_path / "sys")


@pytest.mark.parametrize(
    ("lines", "files", "most"),
    [
        (["0::/"], {"cpu.max": "max 100000"}, None),
        (["0::/"], {"cpu.max": "150000 100000"}, 2),
        (["0::/"], {"cpu.max": "20000 100000"}, 1),
        (["0::/a/b"], {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        (["0::/a/b"], {"a/b/cpu.max": "100000 100000", "a/cpu.max": "300000 100000"}, 1),
        (["0::/of/the/host"], {"cpu.max": "200000 100000"}, 2),  # in a container
        (["0::/"], {}, None),
        (["0::/"], {"cpu.max": "nonsense"}, None),
        (["", "nonsense", "0::/\udcff", "0::/"], {"cpu.max": "200000 100000"}, 2),
        (["4:memory:/a", "1:cpu:/"], {"cpu/cpu.cfs_quota_us": "-1"}, None),
        (
            ["2:cpu,cpuacct:/a", "0::/"],
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "20000"},
            3,
        ),
        (
            ["3:cpuset:/a"],
            {"cpuset/a/cpu.cfs_quota_us": "50000", "cpuset/a/cpu.cfs_period_us": "100000"},
            None,
        ),
    ],
)
def test_quota(tmp_path, lines, files, most):
    assert groups(tmp_path, lines, files) == most


def test_without_control_groups(tmp_path):
    assert quota(tmp_path / "missing", tmp_path) is None


@pytest.mark.skipif(not CPU.available, reason=str(CPU.reason))
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this platform")
def test_threads_stay_within_the_affinity():
    code = (
        "import os, torch\n"
        "from fastgpt import cpu\n"
        "cpu._C.limit_threads(1000)\n"
        "allowed = len(os.sched_getaffinity(0))\n"
        "assert cpu._C.usable_threads(1000) == allowed, (cpu._C.usable_threads(1000), allowed)\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "assert cpu._C.usable_threads(1000) == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not CPU.available, reason=str(CPU.reason))
def test_limit():
    try:
        cpu._C.limit_threads(3, within_affinity=False)
        assert [cpu._C.usable_threads(n) for n in (0, 1, 3, 8)] == [1, 1, 3, 3]
        cpu._C.limit_threads(1)
        assert cpu._C.usable_threads(8) == 1
    finally:
        cpu._C.limit_threads(1 << 30, within_affinity=False)  # as conftest.py has it
