"""How everything is measured: `fastgpt bench`, `fastgpt compare`, `benchmarks/` and the tests.

A case (`case.py`) is a piece of work and the peers that do it; `workloads.py` lists the cases of
the whole model, `verdicts.py` says how far their results are off, `peers.py` has the peers and
their precisions. The timer and the statistic are in `rounds.py`, the error rule in `errors.py`, the
bound in `bound.py`, peak memory in `memory.py`, what a precision costs on real text in
`quality.py`. `libraries.py`, `different_lengths.py`, `torch_gpt.py`, `onednn.py`, `cached_book.py`,
`onnx_runtime.py`, `openvino.py`, `llama.py` and `narrow.py` are peers.
`measure.py` puts the results into a document, `formatting.py`, `charts.py` and `page.py` show it.
"""
