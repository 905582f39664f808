"""Random tests: a few fixed examples in `make test`, new ones for some minutes in `make fuzz`.

A test here is a Hypothesis test that leaves `settings` alone. FUZZ_MINUTES, shared among the
tests, says how long to try new examples; FUZZ_SEED repeats a run. A failing example is shrunk,
printed, and tried first next time.
"""

import functools
import os
import random
import time
from unittest import mock

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, database, is_hypothesis_test, settings
from hypothesis.internal.conjecture import engine

from fuzz import tried

MINUTES = float(os.environ.get("FUZZ_MINUTES", 0))
SEED = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().getrandbits(32))

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("fixed", max_examples=20, derandomize=True, database=None, **COMMON)
settings.register_profile(
    "fuzz",
    max_examples=50,
    database=database.DirectoryBasedExampleDatabase("build/fuzz"),
    phases=set(Phase) - {Phase.explain},
    report_multiple_bugs=False,  # shrink the first at once
    **COMMON,
)
settings.load_profile("fuzz" if MINUTES else "fixed")


class TimeIsUp(BaseException):
    """Ends Hypothesis's run, which takes an Exception for a failure."""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    test = pyfuncitem.obj
    if not MINUTES or not is_hypothesis_test(test):
        return None
    fuzzed = [item for item in pyfuncitem.session.items if is_hypothesis_test(item.obj)]
    seeds = random.Random(f"{SEED} {pyfuncitem.nodeid}")
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    seconds = 60 * MINUTES / len(fuzzed)
    end = time.monotonic() + seconds
    whole, failed = test.hypothesis.inner_test, False

    @functools.wraps(whole)
    def until_the_end(*args, **kwargs):
        nonlocal failed
        if time.monotonic() > end and not failed:  # a failure is shrunk, for as long again at most
            raise TimeIsUp
        try:
            whole(*args, **kwargs)
        except hypothesis.errors.UnsatisfiedAssumption:
            raise
        except Exception:
            failed = True
            raise

    test.hypothesis.inner_test = until_the_end
    try:
        with mock.patch.object(engine, "MAX_SHRINKING_SECONDS", seconds):
            while True:
                hypothesis.seed(seeds.getrandbits(64))(test)
                # Whose database a seed has dropped.
                test._hypothesis_internal_use_settings = settings.default
                test(**arguments)
    except (TimeIsUp, hypothesis.errors.FlakyStrategyDefinition):
        if failed or time.monotonic() < end:  # an example that was left has not drawn all
            raise
    return True


def pytest_terminal_summary(terminalreporter):
    if MINUTES:
        terminalreporter.section(f"fuzz: FUZZ_SEED={SEED} FUZZ_MINUTES={MINUTES:g}")
        for what, number in sorted(tried.counts.items()):
            terminalreporter.line(f"{number:>12,} {what}")
