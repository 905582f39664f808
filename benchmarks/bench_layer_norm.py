"""Layer norm, and the residual sum with the norm that follows it, on [rows, 768]."""

import torch
from torch.nn import functional as F

from benchmarks.cases import benchmark_of, gradients, outputs
from fastgpt import ops, reference

SIZES = [(rows, 768) for rows in (8, 1024, 8192)]


def layer_norm(rows, width):
    forms = {
        "reference": reference.layer_norm,
        "torch": lambda x, weight, bias: F.layer_norm(x, (width,), weight, bias),
        "fastgpt": ops.layer_norm,
    }
    return forms, [torch.randn(rows, width), torch.randn(width), torch.randn(width)]


def add_layer_norm(rows, width):
    def book(x, branch, weight, bias):
        total = branch + x
        return reference.layer_norm(total, weight, bias), total

    def torchs(x, branch, weight, bias):
        total = branch + x
        return F.layer_norm(total, (width,), weight, bias), total

    forms = {"reference": book, "torch": torchs, "fastgpt": ops.add_layer_norm}
    x, branch = torch.randn(rows, width), torch.randn(rows, width)
    return forms, [x, branch, torch.randn(width), torch.randn(width)]


CASES = outputs(layer_norm, SIZES) | outputs(add_layer_norm, SIZES) | gradients(layer_norm, SIZES)
test_layer_norm = benchmark_of(CASES)
