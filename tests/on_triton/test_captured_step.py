"""What the graph of a step of generation holds: how many launches, and nothing that it must not."""

import contextlib
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastgpt
from fastgpt import dispatch
from fastgpt.cpu.records import Block, Linear, Norm
from fastgpt.model import decode_graph
from fastgpt.model.sampling import sampler
from fastgpt.model.token_pass import Parts
from fastgpt.triton.gelu import bias_gelu
from on_triton.support import gpu
from on_triton.support.captured import captured
from on_triton.support.unread import unread

BF16 = torch.bfloat16


def _aten(names):
    return [f"aten.{name}" for name in names.split()]


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


def _step(rows, arch="sm_90", **how):
    with gpu.fake_gpu(arch) as launches, torch.no_grad():
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


@pytest.mark.parametrize(
    ("arch", "rows"), [("sm_90", 1), ("sm_90", 3), ("sm_90", 16), ("gfx942", 1)]
)
def test_one_launch_a_layer_where_it_is_asked_for(monkeypatch, arch, rows):
    monkeypatch.setenv("FASTGPT_DECODE_LAYER", "1")
    found = _step(rows, arch, layers=3)
    assert found.faults == []
    layer = ["decode_layer_kernel"] if arch == "sm_90" else LAYER
    assert found.launches == ["begin_step_kernel", *layer * 3, "linear_rows_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes(dtype):
    found = _step(1, dtype=dtype)
    assert found == ([*found.launches], [])
    assert len(found.launches) == 5 * 2 + 2


def test_more_rows_take_the_vendors_products():
    found = _step(17)
    assert {fault for fault in found.faults if "vendor" in fault}
    assert "begin_step_kernel" not in found.launches


# Temperature, top_k and top_p, and the operations by which a token is chosen under them.
SCALED, DRAWN = _aten("_to_copy div"), _aten("exponential_ div argmax")
CHOICES = {
    "greedy": ((0.0, None, None), _aten("argmax")),
    "temperature": ((0.7, None, None), [*SCALED, *_aten("_softmax"), *DRAWN]),
    "top_k": ((0.7, 5, None), [*SCALED, *_aten("topk lt masked_fill_ _softmax"), *DRAWN]),
    "top_p": (
        (0.7, None, 0.9),
        [*SCALED, *_aten("_softmax sort cumsum sub ge fill_ scatter masked_fill"), *DRAWN],
    ),
}


@pytest.mark.filterwarnings("ignore:fastgpt's triton backend is passed over.*too old")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 17])
def test_a_step_of_pytorchs_operations(monkeypatch, rows, dtype):
    """Attention counts as one: its kernel is not in this torch."""
    row = dispatch._KERNELS["triton"]._replace(reason=lambda index: "it is too old")
    monkeypatch.setitem(dispatch._KERNELS, "triton", row)
    with FakeTensorMode(), torch.no_grad():
        parts = _parts(dtype=dtype)
        state = decode_graph.State(parts, rows, 100)
        found = captured(lambda: decode_graph.step(parts, state), [])
        monkeypatch.setattr(
            decode_graph.F, "scaled_dot_product_attention", lambda q, *kv, attn_mask: q.neg()
        )
        counted = captured(lambda: decode_graph.step(parts, state), [])
    assert [fault for fault in found.faults if "is the vendor's" not in fault] == []
    assert len(counted.launches) == 14 * 2 + 15


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_choice_behind_a_step(choice, rows):
    settings, operations = CHOICES[choice]
    with gpu.fake_gpu("sm_90") as launches, torch.no_grad():
        parts = _parts()
        state = decode_graph.State(parts, rows)

        def run():
            logits = decode_graph.step(parts, state)
            return decode_graph.choose_next(state, logits, sampler(*settings))

        found = captured(run, launches)
    assert found.faults == []
    of_step = len(_step(rows).launches)
    assert found.launches[of_step:] == [*operations, "aten.copy_"]


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "none"])
def test_a_capture_draws_nothing(monkeypatch, kernels):
    """With stand-ins for CUDA, of which the generator is one."""
    compiled = []
    ahead = types.SimpleNamespace(compile_ahead=compiled.append)
    monkeypatch.setattr(dispatch, "module", lambda *args: ahead)
    monkeypatch.setattr(dispatch, "lacks_kernels", lambda device: not kernels)
    of_gpu, held = torch.Generator().manual_seed(3), contextlib.nullcontext()
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: of_gpu.get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: of_gpu.set_state(state))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name in ("current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: held)
    runs, forgotten = [], []
    monkeypatch.setattr(decode_graph, "forget_workspaces", lambda: forgotten.append(len(runs)))

    @contextlib.contextmanager
    def graph(graph, **how):
        before, warm = of_gpu.get_state(), len(runs)
        yield
        assert len(runs) == warm + 1 > 1
        of_gpu.set_state(before)  # recorded, not run

    def run():
        runs.append(torch.rand(1, generator=of_gpu))
        return runs[-1]

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=run))
    before = of_gpu.get_state()
    replay, result = decode_graph.capture(run)
    assert torch.equal(of_gpu.get_state(), before)
    assert result is runs[-1]
    assert forgotten == [1, 2]  # just before the recorded run, and just behind it
    assert torch.equal(replay(), runs[0])
    assert compiled == [run] * kernels


def test_all_that_generation_waits_for_is_the_check_of_the_prompt(monkeypatch):
    row = dispatch._KERNELS["triton"]._replace(device="cpu")
    monkeypatch.setitem(dispatch._KERNELS, "triton", row)
    monkeypatch.setattr(decode_graph, "capture", lambda run: (run, run()))
    steps, following = [], decode_graph.Decoder.next
    monkeypatch.setattr(
        decode_graph.Decoder, "next", lambda *args: steps.append(1) or following(*args)
    )
    with gpu.fake_gpu("sm_90"), fastgpt.use_backend("triton"):
        model = fastgpt.GPTModel(fastgpt.GPT_CONFIG_124M | {"n_layers": 1, "drop_rate": 0.0})
        ids = torch.zeros(2, 3, dtype=torch.int64)
        one, more = (
            unread(lambda new=new: fastgpt.generate_text_simple(model, ids, new, 1024))
            for new in (1, 12)
        )
    assert len(steps) == 11
    assert one == more


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
