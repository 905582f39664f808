"""A forward pass of the whole model, token ids to logits: GPT-2 124M and a toy of two layers."""

from functools import lru_cache, partial

import pytest
import torch

from benchmarks.case import PEERS, Case
from benchmarks.torch_gpt import TorchGPT
from fastgpt import GPT_CONFIG_124M, GPTModel, reference

CONFIGS = {
    "GPT-2 124M": GPT_CONFIG_124M,
    "toy": GPT_CONFIG_124M
    | {"vocab_size": 256, "context_length": 64, "emb_dim": 64, "n_heads": 2, "n_layers": 2},
}
SHAPES = (
    ("GPT-2 124M", (8, 8)),
    ("GPT-2 124M", (1, 256)),
    ("GPT-2 124M", (1, 1024)),
    ("toy", (4, 64)),
)


@lru_cache(maxsize=1)
def models(config: str):
    cfg = CONFIGS[config]
    torch.manual_seed(123)
    book, fused = reference.GPTModel(cfg).eval(), GPTModel(cfg).eval()
    fused.load_state_dict(book.state_dict())
    return book, TorchGPT(book, cfg), torch.compile(book, dynamic=False), fused


def forward(config: str, shape: tuple[int, int]) -> Case:
    book, in_torch, compiled, fused = models(config)
    ids = torch.randint(CONFIGS[config]["vocab_size"], shape)
    with torch.no_grad():
        exact = book.double()(ids)
        book.float()  # and back, exactly: every float32 is a float64
    return Case(
        {
            "reference": lambda: book(ids),
            "torch": lambda: in_torch(ids),
            "compile": lambda: compiled(ids),
            "fastgpt": lambda: fused(ids),
        },
        exact=exact,
    )


CASES = {
    f"forward {config} {list(shape)}": partial(forward, config, shape) for config, shape in SHAPES
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", CASES)
def test_forward(measure, name, peer):
    measure(name, CASES[name], peer)
