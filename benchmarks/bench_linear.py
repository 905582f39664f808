"""The product of a layer, [rows, 768] by [3072, 768], from one row to a long prompt, and its
gradients. The reference is PyTorch's product (MKL's, if torch has it), "torch" that of oneDNN.
"""

import torch
from torch.nn import functional as F

from benchmarks.cases import benchmark_of, gradients, outputs
from fastgpt import ops
from fastgpt.bench.case import OF_AN_OPERATION

SIZES = [(rows, 768, 4 * 768) for rows in (1, 4, 8, 16, 64, 256, 1024)]


def linear(rows, n_in, n_out):
    owner = torch.nn.Module()
    forms = {
        "reference": F.linear,
        "fastgpt": lambda x, weight: ops.linear(x, weight, owner=owner),
    }
    return forms, [torch.randn(rows, n_in), torch.randn(n_out, n_in)]


def linear_forward(*size):
    forms, inputs = linear(*size)
    if torch.backends.mkldnn.is_available():  # it has no gradient
        product = torch.ops.mkldnn._linear_pointwise
        forms["torch"] = lambda x, weight: product(x, weight, None, "none", [], "")
    return forms, inputs


FORWARD, BACKWARD = outputs(linear_forward, SIZES), gradients(linear, SIZES)
CASES = FORWARD | BACKWARD
test_linear = benchmark_of(FORWARD)
test_linear_backward = benchmark_of(BACKWARD, [peer for peer in OF_AN_OPERATION if peer != "torch"])
