"""A training step of GPT-2 124M, forward and backward, without the optimiser's part, which is the
same for all.
"""

import pytest

from fastgpt.bench.case import ALL_PEERS
from fastgpt.bench.works import Work

WORKS = [Work("train", "GPT-2 124M", 2, 256), Work("train", "GPT-2 124M", 2, 512)]
CASES = {work.name: work.case for work in WORKS}


@pytest.mark.parametrize("peer", [p for p in ALL_PEERS if p not in ("torch", "ct2", "cached")])
@pytest.mark.parametrize("name", CASES)
def test_train(measure, name, peer):
    measure(name, CASES[name], peer)
