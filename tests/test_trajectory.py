"""Training on real text, side by side with the reference: bytes of the license, a model of two
layers.
"""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fastgpt
from fastgpt import reference

CONFIG = {
    "vocab_size": 256,
    "context_length": 64,
    "emb_dim": 64,
    "n_heads": 4,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": True,
}


@pytest.fixture(scope="module")
def text():
    """[256, 65] windows of bytes."""
    found = Path(__file__).parent.parent / "LICENSE"
    ids = torch.tensor(list(found.read_bytes()))
    return ids.unfold(0, 65, 32)[:256]


def losses(model, text, steps, seed=0, own_loss=False):
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    history = []
    for _ in range(steps):
        windows = text[torch.randint(len(text), (8,))]
        ids, targets = windows[:, :-1], windows[:, 1:]
        if own_loss:
            loss = model.loss(ids, targets)
        else:
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.detach())
    return torch.stack(history)


def models(**changes):
    cfg = CONFIG | changes
    torch.manual_seed(123)
    ours, book = fastgpt.GPTModel(cfg), reference.GPTModel(cfg)
    book.load_state_dict(ours.state_dict())
    return ours, book


@pytest.mark.parametrize("own_loss", [False, True], ids=["reader's loop", "model.loss"])
@pytest.mark.parametrize("tied", [False, True])
def test_twenty_steps_follow_the_reference(path, text, own_loss, tied):
    ours, book = models()
    for model in (ours, book) if tied else ():
        model.out_head.weight = model.tok_emb.weight
    mine, right = losses(ours, text, 20, own_loss=own_loss), losses(book, text, 20)
    assert right[-1] < 0.8 * right[0]
    torch.testing.assert_close(mine, right, rtol=1e-4, atol=0)


def test_with_dropout_it_gets_as_far(text):
    """Three seeds of each: the last losses differ by no more than the seeds make them differ."""
    last = torch.zeros(2, 3)
    for seed in range(3):
        for i, model in enumerate(models(drop_rate=0.1)):
            last[i, seed] = losses(model, text, 60, seed)[-10:].mean()
    ours, theirs = last
    spread = last.std(1).max().item()
    assert (ours.mean() - theirs.mean()).abs().item() < 3 * spread
    assert spread < 0.1 * theirs.mean().item()
