"""`fastgpt.explain`: what it says is what runs."""

import pytest
import torch
from pairs import pair, some_ids
from test_forward import calls as calls  # how many blocks each call into C++ ran
from torch import nn

import fastgpt
from fastgpt import reference

pytestmark = pytest.mark.skipif(not fastgpt.cpu.isas(), reason="the C++ extension is missing")


def said(model, capsys):
    fastgpt.explain(model)
    return capsys.readouterr().out


def test_a_plain_model(capsys):
    out = said(pair()[0].eval(), capsys)
    assert "float32 on cpu: backend cpu" in out
    assert "the whole pass is one call into C++" in out
    assert "2 of 2 blocks as one operation each" in out
    assert "in the way" not in out


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def hook(module):
    module.register_forward_hook(lambda *args: None)


def wrap_queries(model):
    for block in model.trf_blocks:
        block.att.W_query = Wrapped(block.att.W_query)


def edit_mask(model):
    model.trf_blocks[0].att.mask[0, 1] = 0


def other_eps(model):
    model.trf_blocks[1].norm2.eps = 1e-3


def strided(model):
    weight = model.trf_blocks[1].ff.layers[0].weight
    wide = torch.zeros(weight.shape[0], 2 * weight.shape[1])
    weight.data = wide[:, ::2].copy_(weight.data)


def plain_tensor(model):
    layer = model.trf_blocks[0].att.out_proj
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight


@pytest.mark.parametrize(
    ("change", "line", "blocks"),
    [
        (lambda m: hook(m.trf_blocks[1].att.W_key), "trf_blocks.1.att.W_key: a forward hook", 1),
        (wrap_queries, "trf_blocks.{0-1}.att.W_query: Wrapped in place of Linear", 0),
        (edit_mask, "trf_blocks.0.att.mask: an edited mask", 1),
        (other_eps, "trf_blocks.1.norm2: eps 0.001, norm1 has 1e-05", 1),
        (strided, "trf_blocks.1: a parameter of another dtype, device, shape, layout", 1),
        (plain_tensor, "trf_blocks.0.att.out_proj: a weight or bias that is no parameter", 1),
        (lambda m: hook(m.trf_blocks[0].drop_shortcut), "trf_blocks.0.drop_shortcut: a forward", 1),
        (lambda m: hook(m.drop_emb), "drop_emb: a forward hook", 2),
        (lambda m: hook(m.final_norm), "final_norm: a forward hook", 2),
        (lambda m: setattr(m, "out_head", nn.Identity()), "out_head: Identity in place of", 2),
        (lambda m: setattr(m.tok_emb, "max_norm", 1.0), "tok_emb: a max_norm", 2),
    ],
)
def test_what_stands_in_the_way(change, line, blocks, capsys, calls):
    model = pair()[0].eval()
    change(model)
    out = said(model, capsys)
    assert line in out
    assert f"{blocks} of 2 blocks as one operation" in out
    with torch.no_grad():
        model(some_ids())
    assert sum(ran for ran, _ in calls) == blocks
    records = [block.record() for block in model.trf_blocks]
    ways = [block.obstacles() for block in model.trf_blocks]
    assert [record is None for record in records] == [len(way) > 0 for way in ways]


def test_dropout_while_training(capsys):
    assert "dropout while training" in said(pair(drop_rate=0.1)[0], capsys)
    assert "dropout while training" not in said(pair(drop_rate=0.1)[0].eval(), capsys)


def test_another_backend(capsys):
    model = pair()[0]
    assert "float64 on cpu: backend reference (it takes float32" in said(model.double(), capsys)
    with fastgpt.use_backend("reference"):
        assert "PyTorch's own operations throughout" in said(pair()[0], capsys)


def test_a_model_that_is_not_ours(capsys):
    book = reference.GPTModel(pair()[0].cfg)
    assert "fastgpt.accelerate(model)" in said(book, capsys)
