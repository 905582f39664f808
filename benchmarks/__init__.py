"""Every operation, the whole model and generation against their peers: `python -m benchmarks` for a
table of ratios, or `pytest benchmarks --benchmark-only`. `python -m benchmarks.scaling` draws how
the model's time grows, `python -m benchmarks.gpu` checks and times all of it on a GPU.

Each `bench_*.py` lists its `CASES` by name. A case is one piece of work and how each peer does it:
`fastgpt/bench/case.py` tells the peers' names.
"""
