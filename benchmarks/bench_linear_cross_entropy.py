"""The loss of GPT-2's head, [rows, 768] by [50257, 768], alone as in evaluation, and with its
gradients.
"""

import torch
from torch.nn import functional as F

from benchmarks.cases import benchmark_of, gradients, outputs
from fastgpt import ops

VOCABULARY = 50257
SIZES = [(64, 768), (1024, 768)]


def linear_cross_entropy(rows, width):
    targets, owner = torch.randint(VOCABULARY, (rows,)), torch.nn.Module()
    forms = {
        "reference": lambda x, weight: F.cross_entropy(F.linear(x, weight), targets),
        "fastgpt": lambda x, weight: ops.linear_cross_entropy(x, weight, targets, owner=owner),
    }
    return forms, [torch.randn(rows, width), torch.randn(VOCABULARY, width) * 0.02]


CASES = outputs(linear_cross_entropy, SIZES) | gradients(linear_cross_entropy, SIZES)
test_linear_cross_entropy = benchmark_of(CASES, ("reference", "compile", "fastgpt"))
