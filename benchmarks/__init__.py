"""Every operation and the whole model against their peers: `pytest benchmarks --benchmark-only`, or
`python -m benchmarks` for a table of ratios.

Each `bench_*.py` lists its `CASES` by name. A case is one piece of work and how each peer does it:

- `reference`: the book's code, `fastgpt.reference`;
- `torch`: the same in PyTorch's own fused operations;
- `compile`: the book's code under `torch.compile`;
- `fastgpt`: this package.
"""
