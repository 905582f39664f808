"""One script for one GPU: `python -m benchmarks.gpu` checks every kernel and the model against
float64, then times each operation, training and generation against their peers, in under 8 minutes.
It prints a table and writes results.json and table.md. `--dry-run` goes the same way with tiny
sizes on a machine without a GPU, the kernels interpreted; its figures mean nothing.
"""
