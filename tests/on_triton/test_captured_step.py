"""What the graph of a step of generation holds: how many launches, and nothing that it must not."""

import pytest
import torch

from fastgpt import dispatch
from fastgpt.cpu.records import Block, Linear, Norm
from fastgpt.model import decode_graph
from fastgpt.model.token_pass import Parts
from fastgpt.triton.gelu import bias_gelu
from on_triton.support import gpu
from on_triton.support.captured import captured

BF16 = torch.bfloat16
LAYER = ["query_key_value_kernel", "decode_attention_split_kernel", *["linear_rows_kernel"] * 3]


@pytest.fixture(autouse=True)
def _on_fake_tensors(monkeypatch):
    row = dispatch._KERNELS["triton"]._replace(reason=lambda index: None)
    monkeypatch.setitem(dispatch._KERNELS, "triton", row)
    monkeypatch.setattr(dispatch, "direct", lambda tensors: True)


def _cuda(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="cuda")


def _parts(width=768, heads=12, layers=2, biases=False, by_column=False, dtype=BF16):
    def linear(n_out, n_in, bias=True):
        weight = _cuda(n_in, n_out, dtype=dtype).t() if by_column else None
        weight = _cuda(n_out, n_in, dtype=dtype) if weight is None else weight
        return Linear(weight, _cuda(n_out, dtype=dtype) if bias else None)

    def norm():
        return Norm(_cuda(width, dtype=dtype), _cuda(width, dtype=dtype))

    def block():
        attention = [linear(width, width, biases) for _ in range(3)]
        feed_forward = linear(4 * width, width), linear(width, 4 * width)
        return Block(norm(), *attention, linear(width, width), norm(), *feed_forward)

    tok, pos = _cuda(50257, width, dtype=dtype), _cuda(1024, width, dtype=dtype)
    blocks = tuple(block() for _ in range(layers))
    return Parts(tok, pos, blocks, norm(), linear(50257, width, False), heads, 1e-5)


def _step(rows, **how):
    with gpu.fake_gpu("sm_90") as launches, torch.no_grad():
        parts = _parts(**how)
        state = decode_graph.State(parts, rows)
        return captured(lambda: decode_graph.step(parts, state), launches)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("by_column", [False, True], ids=["by row", "by column"])
def test_five_launches_a_layer_and_two_a_token(rows, biases, by_column):
    found = _step(rows, biases=biases, by_column=by_column)
    assert found.faults == []
    assert found.launches == ["begin_step_kernel", *LAYER * 2, "linear_rows_kernel"]


@pytest.mark.parametrize(("width", "heads", "layers"), [(768, 12, 12), (1600, 25, 48)], ids=str)
def test_launches_a_token(width, heads, layers):
    found = _step(1, width=width, heads=heads, layers=layers)
    assert found.faults == []
    assert len(found.launches) == 5 * layers + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes(dtype):
    found = _step(1, dtype=dtype)
    assert found == ([*found.launches], [])
    assert len(found.launches) == 5 * 2 + 2


def test_more_rows_take_the_vendors_products():
    found = _step(17)
    assert {fault for fault in found.faults if "vendor" in fault}
    assert "begin_step_kernel" not in found.launches


FAULTS = {
    "a number read": (lambda x: x.sum().item(), "_local_scalar_dense waits for the GPU"),
    "a comparison": (lambda x: torch.equal(x, x), "equal waits for the GPU"),
    "a copy to the host": (lambda x: x.cpu(), "_to_copy touches memory of cpu"),
    "a copy from the host": (lambda x: torch.empty(3).to("cuda"), "empty touches memory of cpu"),
    "a product": (lambda x: x @ x, "mm is the vendor's"),
    "a product with a bias": (
        lambda x: torch.nn.functional.linear(x, x, x.view(-1).as_strided((16,), (1,))),
        "addmm is the vendor's",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_graph_must_not_hold_is_found(fault):
    run, message = FAULTS[fault]
    with gpu.fake_gpu("sm_90") as launches:
        x = _cuda(16, 16)
        found = captured(lambda: run(x), launches)
    assert message in found.faults


def test_a_kernel_compiled_while_capturing_is_found():
    with gpu.fake_gpu("sm_90") as launches:
        inputs = [_cuda(16, 64), _cuda(16, 63)]
        found = captured(lambda: bias_gelu(x := inputs.pop(), None, x), launches)
    assert found == (
        ["bias_gelu_fwd_kernel"],
        ["bias_gelu_fwd_kernel was not compiled in the warm-up"],
    )
