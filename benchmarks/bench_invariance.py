"""What fastgpt.batch_invariant costs, in each precision."""

from functools import partial

import torch

import fastgpt
from benchmarks.cases import Cases, benchmark_of
from fastgpt.bench.case import Case
from fastgpt.bench.peers import PEERS, chosen

SIZES = (("forward", 1, 1024), ("forward", 1, 128), ("decode", 1, 64), ("decode", 8, 64))
NEW = 32


def _case(kind: str, batch: int, tokens: int, precision: str) -> Case:
    """A forward pass over ids [batch, tokens], or the generation of NEW more."""
    model = fastgpt.GPTModel(fastgpt.GPT_CONFIG_124M).eval()
    if precision.startswith("int"):
        model = fastgpt.quantize(model, precision)
    else:
        model = model.to(getattr(torch, precision))
    ids = torch.randint(0, model.cfg["vocab_size"], (batch, tokens))

    def run() -> None:
        with torch.no_grad():
            if kind == "forward":
                model(ids)
            else:
                fastgpt.generate(model, ids, NEW, model.cfg["context_length"], prompt_lookup=False)

    def alike() -> None:
        with fastgpt.batch_invariant():
            run()

    plain, invariant = chosen(("fastgpt", "alike"), (precision,))
    return Case({plain: run, invariant: alike}, None, base=plain)


CASES: Cases = {
    f"{kind} {precision} [{batch}, {tokens}]": partial(_case, kind, batch, tokens, precision)
    for precision in ("float32", "bfloat16", "int8", "int8-dynamic", "int4")
    for kind, batch, tokens in SIZES
}
test_invariance = benchmark_of(
    CASES, [n for n, p in PEERS.items() if p.engine in ("fastgpt", "alike")]
)
