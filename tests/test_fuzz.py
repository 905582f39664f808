"""How tests/fuzz spends its minutes."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# Each example takes a tenth of a second, and shrinking a few hundred of them.
TEST = """
import time
from hypothesis import given, strategies

@given(strategies.lists(strategies.integers(), min_size=40))
def test_that_fails(numbers):
    with open("examples", "a") as file:
        file.write("x")
    time.sleep(0.1)
    assert sum(number > 1000 for number in numbers) < 10
"""


def test_shrinking_ends_with_what_it_has(tmp_path):
    (tmp_path / "test_it.py").write_text(TEST)
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "fuzz.conftest", "test_it.py"],
        cwd=tmp_path,
        env=os.environ | {"FUZZ_MINUTES": "0.05", "FUZZ_SEED": "1", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 1, found.stdout
    assert ": test_that_fails(" in found.stdout  # with its numbers
    # Three seconds to find it and three to shrink it, and the last one once more.
    assert len((tmp_path / "examples").read_text()) < 70
