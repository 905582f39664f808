"""Where Triton, or one of its kernels, cannot run: the reference does, and the reason is said."""

import subprocess

import pytest
import torch
from torch.nn import functional as F
from triton.compiler.errors import CompilationError
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import KernelInterface

import fastgpt
from fastgpt import cli, dispatch, ops, triton
from fastgpt.quantized_weight import quantize_weight

CPU = torch.device("cpu")


@pytest.fixture
def on_triton(dispatched, monkeypatch):
    """CPU tensors go to the interpreted kernels, and nothing was asked for by name."""
    monkeypatch.setattr(dispatch, "_BY_DEVICE", {"cpu": "triton"})
    dispatch._say.cache_clear()
    with fastgpt.use_backend("auto"):
        yield
    dispatch._say.cache_clear()
    dispatch._failed.clear()


@pytest.fixture
def fails(monkeypatch):
    """fails(kernel, error): that kernel's launches, or all, raise the error; yields their names."""
    launch, tried = KernelInterface.__getitem__, []

    def use(kernel, error):
        def launcher(k, grid):
            if k.__name__ != (kernel or k.__name__):
                return launch(k, grid)

            def run(*args, **kwargs):
                tried.append(k.__name__)
                raise error

            return run

        monkeypatch.setattr(KernelInterface, "__getitem__", launcher)
        return tried

    return use


def too_large():
    return OutOfResources(263000, 232448, "shared memory")


def _attention(q, k, v):
    return ops.causal_attention(q, k, v)


def _cross_entropy(reduction):
    targets = torch.arange(7) % 5
    return lambda x, w: ops.linear_cross_entropy(x, w, targets, reduction=reduction)


def _embedding(tok, pos):
    return ops.embedding(torch.tensor([[1, 3, 0]]), tok, pos)


def _quantized(precision):
    weight = quantize_weight(torch.linspace(-1, 1, 5 * 64).view(5, 64), precision)
    return lambda x, bias: ops.quantized_linear(x, weight, bias)


HEADS = ((1, 2, 9, 16),) * 3
NORM = ((7, 24), (24,), (24,))
CASES = {
    "layer_norm_fwd_kernel": (ops.layer_norm, NORM),
    "layer_norm_bwd_kernel": (ops.layer_norm, NORM),
    "sum_rows_kernel": (ops.add_layer_norm, ((7, 24), *NORM)),
    "bias_gelu_fwd_kernel": (ops.bias_gelu, ((7, 24), (24,))),
    "bias_gelu_bwd_kernel": (ops.bias_gelu, ((7, 24), (24,))),
    "embedding_fwd_kernel": (_embedding, ((5, 8), (4, 8))),
    "position_bwd_kernel": (_embedding, ((5, 8), (4, 8))),
    "causal_attention_fwd_kernel": (_attention, HEADS),
    "causal_attention_bwd_dkdv_kernel": (_attention, HEADS),
    "cross_entropy_fwd_kernel": (_cross_entropy("mean"), ((7, 8), (5, 8))),
    "cross_entropy_bwd_kernel": (_cross_entropy("none"), ((7, 8), (5, 8))),
    "linear_rows_kernel": (ops.linear_gelu, ((7, 8), (5, 8), (5,))),
    "int8_rows_kernel": (_quantized("int8"), ((7, 64), (5,))),
    "int4_rows_kernel": (_quantized("int4"), ((7, 64), (5,))),
}


def _run(f, inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    outputs = f(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad([o.square().sum() for o in outputs], leaves)
    return [o.detach() for o in outputs], grads


@pytest.mark.parametrize("kernel", CASES)
def test_its_operation_runs_on_the_reference(on_triton, fails, recwarn, kernel):
    f, shapes = CASES[kernel]
    inputs = [torch.randn(shape) for shape in shapes]
    with fastgpt.use_backend("reference"):
        right = _run(f, inputs)
    tried = fails(kernel, too_large())
    for _ in range(2):
        torch.testing.assert_close(_run(f, inputs), right, rtol=1e-4, atol=1e-5)
    assert tried == [kernel]
    said = [str(w.message) for w in recwarn if w.category is fastgpt.BackendWarning]
    assert len(said) == 1
    assert "shared memory, Required: 263000, Hardware limit: 232448" in said[0]


@pytest.mark.parametrize("kernel", CASES)
def test_asked_for_by_name_it_raises(on_triton, fails, kernel):
    f, shapes = CASES[kernel]
    fails(kernel, too_large())
    with fastgpt.use_backend("triton"):
        for _ in range(2):
            with pytest.raises(fastgpt.BackendError, match=r"'triton' cannot run.*shared memory"):
                _run(f, [torch.randn(shape) for shape in shapes])


def test_a_dropout_by_itself_goes_on(on_triton, fails, recwarn):
    x = torch.randn(5, 40)
    tried = fails("dropout_kernel", too_large())
    y = ops.dropout(x, 0.5)
    assert tried == ["dropout_kernel"]
    assert ((y == 0) | (y == 2 * x)).all()
    assert 0 < (y == 0).sum() < x.numel()
    assert [w.category for w in recwarn] == [fastgpt.BackendWarning]


def _add_norm(x, branch, weight, bias):
    return ops.add_layer_norm(x, branch, weight, bias, dropout_p=0.4)


DROPPED = {
    "layer_norm_bwd_kernel": (_add_norm, ((7, 22), (7, 22), (22,), (22,))),
    "causal_attention_bwd_dq_kernel": (
        lambda q, k, v: ops.causal_attention(q, k, v, dropout_p=0.4),
        HEADS,
    ),
    "token_bwd_kernel": (
        lambda t, p: ops.embedding(torch.tensor([[1, 3, 0]]), t, p, dropout_p=0.4),
        ((5, 6), (4, 6)),
    ),
}


@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
@pytest.mark.parametrize("kernel", DROPPED)
def test_a_backward_kernel_that_fails_behind_a_dropout(on_triton, fails, kernel):
    """The forward kernel drew a mask; the reference's gradients are those of that mask."""
    f, shapes = DROPPED[kernel]
    inputs, found = [torch.randn(shape) for shape in shapes], []
    for failing in (False, True):
        if failing:
            fails(kernel, too_large())
        torch.manual_seed(5)
        found.append(_run(f, inputs))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
def test_what_is_written_in_place_stays_until_the_reference_has_read_it(on_triton, fails):
    fails("bias_gelu_fwd_kernel", too_large())
    x, bias = torch.randn(3, 8), torch.randn(8)
    right = F.gelu(x + bias, approximate="tanh")
    assert ops.bias_gelu(x, bias, out=x) is x
    torch.testing.assert_close(x, right)


@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
def test_a_registered_operation_falls_back_too(on_triton, fails):
    fails(None, too_large())
    x, bias = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    y = torch.ops.fastgpt.bias_gelu(x, bias)
    torch.testing.assert_close(y, F.gelu(x + bias, approximate="tanh"))
    q, k, v = (torch.randn(1, 2, 5, 16, requires_grad=True) for _ in range(3))
    out, _ = torch.ops.fastgpt.causal_attention(q, k, v, 0.25)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25).transpose(1, 2)
    torch.testing.assert_close(out, theirs)
    grads = (torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, theirs))
    torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")
def test_it_is_listed(on_triton, fails, capsys):
    fails(None, too_large())
    ops.gelu(torch.ones(3))
    assert "gelu runs on reference" in fastgpt.backends()["triton"].detail
    assert cli.main(["info"]) == 0
    assert "a kernel of gelu failed, OutOfResources" in capsys.readouterr().out


def _of_triton(text):
    """As triton raises it while it compiles."""
    try:
        exec("raise RuntimeError(text)", {"__name__": "triton.runtime.build", "text": text})
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        CompilationError("x", None, "no such thing"),
        TritonError("ptxas"),
        subprocess.CalledProcessError(1, ["gcc"]),
        RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
        RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_says_that_a_kernel_cannot_run(error):
    assert triton.cannot_run(error)


def test_an_error_inside_tritons_own_code_says_so_too():
    assert triton.cannot_run(_of_triton("PassManager::run failed"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("x"),
    ],
    ids=str,
)
def test_any_other_error_is_raised(on_triton, fails, error):
    fails(None, error)
    with pytest.raises(type(error)) as raised:
        ops.gelu(torch.ones(3))
    assert raised.value is error
    assert not dispatch._failed


def test_a_probe_that_runs(interpreted):
    assert triton.launch_failure(CPU) is None


def test_a_probe_without_a_compiler(interpreted, fails):
    fails(None, _of_triton("Failed to find C compiler. Please specify via CC"))
    assert triton.launch_failure(CPU) == (
        "triton cannot launch a kernel: RuntimeError: Failed to find C compiler. Please specify "
        "via CC"
    )


def test_a_probe_without_a_driver():
    """What really happens on a machine without a GPU."""
    assert "triton cannot launch a kernel: RuntimeError: 0 active" in triton.launch_failure(CPU)


@pytest.mark.parametrize(
    ("version", "runs"), [("3.1.0", False), ("3.4.0", False), ("3.6.0+git1", True)]
)
def test_the_version_is_asked_before_anything_of_it_is_imported(
    interpreted, monkeypatch, version, runs
):
    monkeypatch.setattr("triton.__version__", version)
    reason = triton.launch_failure(CPU)
    assert reason == (None if runs else f"the kernels need triton 3.6 or newer, this is {version}")
