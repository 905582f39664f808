"""Every operation and the whole model against their peers: `python -m benchmarks` prints a table of
ratios, `pytest benchmarks --benchmark-only` times them by pytest-benchmark. `python -m
benchmarks.scaling` draws how the model's time grows, `python -m benchmarks.gpu` checks and times
everything on a GPU.

Each `bench_*.py` lists its cases by name: `fastgpt/bench/case.py` says what a case is.
"""
