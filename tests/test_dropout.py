"""Dropout draws the very numbers that the reference draws, and none where it drops nothing."""

import pytest
import torch
from pairs import assert_same, assert_same_model, outputs_and_grads, pair, some_ids
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")


@pytest.mark.parametrize("where", ["everywhere", "drop_emb", "att.dropout", "drop_shortcut"])
def test_dropout_draws_what_the_reference_draws(where):
    results = []
    for model in pair():
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and (where == "everywhere" or name.endswith(where)):
                module.p = 0.4
        torch.manual_seed(9)
        results.append(outputs_and_grads(model, some_ids()))
        results[-1]["generator"] = torch.get_rng_state()
    assert_same(*results)
    assert not torch.allclose(results[0]["output"], pair()[0](some_ids()), atol=1e-2)


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.0, False), (0.4, False)])
def test_no_dropout_draws_nothing(p, training):
    ours, _ = pair(drop_rate=p)
    before = torch.get_rng_state()
    ours.train(training)(some_ids()).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_everything_dropped():
    assert_same_model(*pair(drop_rate=1.0))


def test_one_part_in_training_mode():
    results = []
    for model in pair(drop_rate=0.4):
        model.eval()
        model.trf_blocks[1].att.train()
        torch.manual_seed(9)
        results.append(outputs_and_grads(model, some_ids()))
    assert_same(*results)


def test_training_with_dropout_holds_no_mask():
    model = pair(drop_rate=0.3)[0].train()
    model(some_ids())
    assert all(block.att._buffers["mask"] is None for block in model.trf_blocks)
