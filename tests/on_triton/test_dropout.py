import philox
import pytest
import torch

import fastgpt
from fastgpt.cpu import dropout as cpu
from fastgpt.triton.dropout import dropout
from on_triton.support.cases import Case, empty

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (9, 300)], ids=str)
def test_the_mask(padded, shape, p):
    x = padded(torch.randn(shape))
    expected = x * philox.keep(5, (1, *shape) if len(shape) == 1 else shape, p).float().view(shape)
    dropout(x, p, 5)
    torch.testing.assert_close(x, expected)


@pytest.mark.skipif(not fastgpt.cpu.isas(), reason="the C++ extension is missing")
@pytest.mark.parametrize("shape", [(2, 3, 40), (5, 7)], ids=str)
def test_the_mask_is_the_cpu_s(shape):
    on_gpu, on_cpu = torch.ones(shape), torch.ones(shape)
    dropout(on_gpu, 0.3, 2**40 + 3)
    cpu.dropout(on_cpu, 0.3, 2**40 + 3)
    assert torch.equal(on_gpu, on_cpu)


def _run(dtype):
    dropout(empty(dtype, 4096, 768), 0.1, 7)


CASES = {"in place": Case(_run, sample=("float32",))}
