"""How much was tried, by kind, for the summary of `make fuzz`."""

from collections import Counter

counts: Counter[str] = Counter()


def count(what, number=1):
    counts[what] += number
