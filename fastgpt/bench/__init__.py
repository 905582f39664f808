"""The measurement behind `fastgpt bench` and `python -m benchmarks`: pieces of work, the peers that
do each, what they cost, and the report on it.

`works.py` lists the work, `case.py` says what one is; `libraries.py`, `torch_gpt.py` and
`cached_book.py` are the peers, `measure.py` and `memory.py` time and weigh them, `charts.py` and
`page.py` draw the result.
"""
