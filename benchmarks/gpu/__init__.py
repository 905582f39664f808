"""One script for one GPU: `python -m benchmarks.gpu` checks every kernel and the model against
float64, then times each operation, training and generation against their peers, in under 8 minutes.
It prints a table and writes results.json and table.md. `--dry-run` does the same at tiny sizes
without a GPU, with interpreted kernels; its figures mean nothing.
"""
