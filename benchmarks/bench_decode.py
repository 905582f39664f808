"""Greedy generation by GPT-2 124M: a prompt, then new tokens one by one.

The reference is the book's model with a cache; its plain loop runs the whole sequence again for
each token, and takes some ten times as long.
"""

import pytest

from fastgpt.bench.workloads import Work

WORKS = [Work("decode", "GPT-2 124M", 1, 128, 64), Work("decode", "GPT-2 124M", 8, 64, 32)]
CASES = {work.name: work.case for work in WORKS}


@pytest.mark.parametrize("peer", ["reference", "hf", "ct2", "products", "fastgpt"])
@pytest.mark.parametrize("name", CASES)
def test_decode(measure, name, peer):
    measure(name, CASES[name], peer)
