"""A forward pass of the whole model, token ids to logits: GPT-2 124M and a toy of two layers."""

from functools import lru_cache, partial

import pytest
import torch

from benchmarks import libraries
from benchmarks.case import ALL_PEERS, Case
from benchmarks.torch_gpt import TorchGPT
from fastgpt import GPT_CONFIG_124M, GPTModel, reference

CONFIGS = {
    "GPT-2 124M": GPT_CONFIG_124M,
    "toy": GPT_CONFIG_124M
    | {"vocab_size": 256, "context_length": 64, "emb_dim": 64, "n_heads": 2, "n_layers": 2},
}
SHAPES = (
    ("GPT-2 124M", (2, 4)),
    ("GPT-2 124M", (8, 8)),
    ("GPT-2 124M", (8, 128)),
    ("GPT-2 124M", (1, 1024)),
    ("toy", (4, 64)),
)


@lru_cache(maxsize=1)
def models(config: str):
    cfg = CONFIGS[config]
    torch.manual_seed(123)
    book, fused = reference.GPTModel(cfg).eval(), GPTModel(cfg).eval()
    fused.load_state_dict(book.state_dict())
    missing = libraries.missing("transformers")
    hf = None if missing or config == "toy" else libraries.hugging_face(book, cfg)
    return book, TorchGPT(book, cfg), torch.compile(book, dynamic=False), hf, missing, fused


def forward(config: str, shape: tuple[int, int]) -> Case:
    cfg = CONFIGS[config]
    book, in_torch, compiled, hf, missing, fused = models(config)
    ids = torch.randint(cfg["vocab_size"], shape)
    with torch.no_grad():
        exact = book.double()(ids)
        book.float()  # and back, exactly: every float32 is a float64
    peers = {
        "reference": lambda: book(ids),
        "torch": lambda: in_torch(ids),
        "compile": lambda: compiled(ids),
        "hf": lambda: hf(ids, use_cache=False).logits,
        "floor": libraries.products(ids.numel(), cfg, head_rows=ids.numel()),
        "fastgpt": lambda: fused(ids),
    }
    if hf is None:
        del peers["hf"]
    if config == "toy":
        del peers["floor"]
    skipped = {"hf": missing} if missing else {}
    return Case(peers, exact, skipped)


CASES = {
    f"forward {config} {list(shape)}": partial(forward, config, shape) for config, shape in SHAPES
}


@pytest.mark.parametrize("peer", [p for p in ALL_PEERS if p != "ct2"])
@pytest.mark.parametrize("name", CASES)
def test_forward(measure, name, peer):
    measure(name, CASES[name], peer)
