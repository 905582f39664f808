"""GELU, and the bias with the GELU that follows it, on the hidden layer's [rows, 3072]."""

from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.cases import benchmark_of, gradients, outputs
from fastgpt import ops, reference

SIZES = [(rows, 4 * 768) for rows in (8, 1024, 8192)]


def gelu(rows, width):
    forms = {
        "reference": reference.gelu,
        "torch": partial(F.gelu, approximate="tanh"),
        "fastgpt": ops.gelu,
    }
    return forms, [torch.randn(rows, width)]


def bias_gelu(rows, width):
    forms = {
        "reference": lambda x, bias: reference.gelu(x + bias),
        "torch": lambda x, bias: F.gelu(x + bias, approximate="tanh"),
        "fastgpt": ops.bias_gelu,
    }
    return forms, [torch.randn(rows, width), torch.randn(width)]


CASES = outputs(gelu, SIZES) | outputs(bias_gelu, SIZES) | gradients(bias_gelu, SIZES)
test_gelu = benchmark_of(CASES)
