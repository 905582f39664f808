"""Models and layers that cannot be quantised: each error names the layer, and changes nothing."""

import re

import pytest
import torch
from pairs import wrap_weight
from quantized_models import full, hook, logits, put_lora, quantized
from torch import nn

import fastgpt

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")


def lora(model):
    put_lora(model.trf_blocks[1])


def subclass(model):
    model.out_head.__class__ = type("Mine", (nn.Linear,), {})


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.trf_blocks[0].ff.layers[2])


def forward_of_its_own(model):
    model.out_head.forward = lambda x: x


def wrapped_weight(model):
    wrap_weight(model.out_head)


def foreign_block(model):
    model.trf_blocks[0] = nn.Sequential(nn.Linear(96, 96), nn.Bilinear(2, 2, 2))


def hooked_table(model):
    model.out_head.weight = model.tok_emb.weight
    model.tok_emb.register_forward_hook(lambda *args: None)


def renormalised_table(model):
    model.out_head.weight = model.tok_emb.weight
    model.tok_emb.max_norm = 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (hook, "trf_blocks.1.att.W_key cannot be quantised: a forward hook"),
        (lora, "trf_blocks.1.att.W_query cannot be quantised: a Beside (and 5 more layers)"),
        (subclass, "out_head cannot be quantised: a Mine"),
        (parametrised, "trf_blocks.0.ff.layers.2 cannot be quantised: a ParametrizedLinear"),
        (forward_of_its_own, "out_head cannot be quantised: a forward of its own"),
        (wrapped_weight, "out_head cannot be quantised: a weight that is not a plain parameter"),
        (foreign_block, "trf_blocks.0.1 cannot be quantised: a Bilinear"),
        (hooked_table, "tok_emb cannot be quantised: a forward hook"),
        (renormalised_table, "tok_emb cannot be quantised: a max_norm"),
    ],
)
def test_layers_that_cannot_be_quantised(change, said):
    model = full()
    change(model)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=re.escape(said)):
        fastgpt.quantize(model, "int8")
    assert [type(m) for m in model.modules()] == kinds


def test_hooks_elsewhere_stay():
    model, seen = full(), []
    model.trf_blocks[0].norm1.register_forward_hook(lambda *args: seen.append(1))
    logits(fastgpt.quantize(model, "int8"))
    assert seen == [1]


def test_what_cannot_be_quantised():
    for given, options, error, said in (
        (full(), {"precision": "int3"}, ValueError, "unknown precision 'int3', expected one of"),
        (full(), {"precision": "int4", "group": 16}, ValueError, "a group of 16 is not possible"),
        (
            full(),
            {"precision": "int4", "group": 64},
            ValueError,
            "W_query.weight cannot be quanti",
        ),
        (quantized(), {"precision": "int8"}, TypeError, "W_query cannot be quantised: already in "),
        (nn.Linear(2, 2), {"precision": "int8"}, TypeError, "a Linear cannot be quantised, only"),
    ):
        with pytest.raises(error, match=said):
            fastgpt.quantize(given, **options)
    model = full()
    model.trf_blocks[1].ff.layers[0].weight.data[7, 7] = torch.nan
    with pytest.raises(
        ValueError, match=r"trf_blocks.1.ff.layers.0.weight cannot be quantised to int8: it has val"
    ):
        fastgpt.quantize(model, "int8")
    model = full()
    model.final_norm.bfloat16()
    with pytest.raises(ValueError, match=r"float32.*final_norm.scale is bfloat16"):
        fastgpt.quantize(model, "int8")
