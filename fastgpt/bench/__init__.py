"""How everything is measured: `fastgpt bench`, `fastgpt compare`, `benchmarks/` and the tests.

A case (`case.py`) is a piece of work and the peers that do it; `workloads.py` lists the cases of
the whole model. The timer and the statistic are in `rounds.py`, the error rule in `errors.py`, the
bound in `bound.py`, peak memory in `memory.py`. `libraries.py`, `torch_gpt.py` and `cached_book.py`
are peers. `measure.py` puts the results into a document, `formatting.py`, `charts.py` and `page.py`
show it.
"""
