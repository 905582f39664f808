"""A training step, forward and backward, of GPT-2 124M with a tied head and of a toy: the reader's
loop, and ``model.loss``. The error is that of the loss and of two weights' gradients.
"""

from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgpt import GPT_CONFIG_124M, GPTModel, reference
from fastgpt.bench import libraries
from fastgpt.bench.case import ALL_PEERS, Case

GPT2 = GPT_CONFIG_124M | {"drop_rate": 0.0, "qkv_bias": True}
CONFIGS = {
    "124M": GPT2,
    "124M, dropout 0.1": GPT2 | {"drop_rate": 0.1},
    "toy": GPT2
    | {"vocab_size": 256, "context_length": 64, "emb_dim": 64, "n_heads": 4, "n_layers": 2},
}
SHAPES = (("124M", (2, 512)), ("124M, dropout 0.1", (2, 512)), ("toy", (8, 64)))


@lru_cache(maxsize=1)
def models(config: str):
    cfg = CONFIGS[config]
    torch.manual_seed(123)
    book, fused = reference.GPTModel(cfg), GPTModel(cfg)
    fused.load_state_dict(book.state_dict())
    for model in (book, fused):
        model.out_head.weight = model.tok_emb.weight
    with torch.no_grad():  # as GPT-2 starts; the book's embeddings, tied, would know every token
        for ours, weight in zip(fused.parameters(), book.parameters(), strict=True):
            ours.copy_(weight.normal_(0, 0.02) if weight.dim() > 1 else weight)
    hf = None
    if config == "124M" and libraries.missing("transformers") is None:
        hf = libraries.hugging_face(book, cfg).train()
        hf.lm_head.weight = hf.transformer.wte.weight
        for module in hf.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return book, torch.compile(book, dynamic=False), hf, fused


def readers_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1).flatten())


@torch.enable_grad()
def step(model: nn.Module, loss: Tensor) -> tuple[Tensor, ...]:
    """The loss and two gradients: the first that backward makes, and the last."""
    loss.backward()
    named = dict(model.named_parameters())
    kept = [named[name].grad for name in ("final_norm.scale", "pos_emb.weight") if name in named]
    model.zero_grad()
    return loss.detach(), *kept


def hf_step(hf: nn.Module, ids: Tensor) -> None:
    """No result: its loss is of the ids that follow, another number from the same work."""
    step(hf, hf(ids, labels=ids).loss)


@torch.enable_grad()
def train(config: str, shape: tuple[int, int]) -> Case:
    cfg = CONFIGS[config]
    book, compiled, hf, fused = models(config)
    ids = torch.randint(cfg["vocab_size"], shape)

    def exact() -> tuple[Tensor, ...]:
        double = reference.GPTModel(cfg).double()
        double.load_state_dict(book.state_dict())
        double.out_head.weight = double.tok_emb.weight
        return step(double, readers_loss(double, ids))

    def grad(run):
        return torch.enable_grad()(run)

    peers = {
        "reference": grad(lambda: step(book, readers_loss(book, ids))),
        "compile": grad(lambda: step(book, readers_loss(compiled, ids))),
        "hf": grad(lambda: hf_step(hf, ids)),
        "products": libraries.products(ids.numel(), cfg, head_rows=ids.numel(), backward=True),
        "fastgpt": grad(lambda: step(fused, readers_loss(fused, ids))),
        "loss": grad(lambda: step(fused, fused.loss(ids, ids.roll(-1)))),
    }
    if hf is None:
        del peers["hf"]
    if config == "toy":
        del peers["products"]
    return Case(peers, None if cfg["drop_rate"] else exact())


CASES = {f"train {config} {list(shape)}": partial(train, config, shape) for config, shape in SHAPES}


@pytest.mark.parametrize("peer", [p for p in ALL_PEERS if p not in ("torch", "ct2")])
@pytest.mark.parametrize("name", CASES)
def test_train(measure, name, peer):
    measure(name, CASES[name], peer)
