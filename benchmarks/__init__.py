"""Every operation, the whole model and generation against their peers: `python -m benchmarks` for a
table of ratios, or `pytest benchmarks --benchmark-only`. `python -m benchmarks.scaling` draws how
the model's time grows, `python -m benchmarks.gpu` checks and times all of it on a GPU.

Each `bench_*.py` lists its `CASES` by name. A case is one piece of work and how each peer does it:

- `reference`: the book's code, `fastgpt.reference`;
- `torch`: the same in PyTorch's own fused operations;
- `compile`: the book's code under `torch.compile`;
- `hf`: Hugging Face's GPT-2 with PyTorch's fused attention, where transformers is installed;
- `ct2`: CTranslate2 in float32, where it is installed;
- `floor`: no peer but a bound, only what a library's products cannot avoid;
- `fastgpt`: this package.
"""
