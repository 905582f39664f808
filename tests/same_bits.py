"""What the tests of the same bits share: small models of every kind of weight."""

import torch

import fastgpt

VOCABULARY, LAYERS = 61, 2
KINDS = ["float32", "column-major", "bfloat16", "float16", "int8", "int8-dynamic"]


def model_of(kind="float32", **config):
    """Four widths, as deep as its down projection is, are deeper than one depth of a sum."""
    sizes = {"vocab_size": VOCABULARY, "context_length": 301, "emb_dim": 208, "n_heads": 4}
    rest = {"n_layers": LAYERS, "drop_rate": 0.0, "qkv_bias": True}
    model = fastgpt.GPTModel(sizes | rest | config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * 0.05)
            if kind == "column-major" and p.dim() == 2 and "emb" not in name:
                p.data = p.data.t().contiguous().t()
    if kind.startswith("int"):
        return fastgpt.quantize(model, kind)
    return model.to(getattr(torch, kind, torch.float32))


def ids_of(*shape):
    return torch.randint(0, VOCABULARY, shape)
