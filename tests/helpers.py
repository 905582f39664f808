"""What several tests share: the paths that this machine can run, and the rule for errors."""

import contextlib
import warnings

import torch

import fastgpt
from fastgpt.bench.errors import (
    allowed_error,
    as_tuple,
    largest_error,
    leaves_of,
    outputs_and_gradients,
)

# Every backend, and the C++ one on every instruction set that this machine has.
PATHS = ["reference", *(f"cpu-{isa}" for isa in fastgpt.cpu.isas())]
FUSED = [path for path in PATHS if path != "reference"]
# The instruction set that multiplies by pairs of bfloat16 where it pays.
PAIRS = "avx512_bf16"


@contextlib.contextmanager
def use_path(path):
    backend, _, isa = path.partition("-")
    instructions = fastgpt.cpu.use_isa(isa) if isa else contextlib.nullcontext()
    with fastgpt.use_backend(backend), instructions:
        yield


def assert_as_exact(ours, theirs, exact, label=""):
    """Our error against float64 is at most what the error rule allows."""
    assert ours.shape == exact.shape, label
    if exact.numel() == 0:
        return
    assert torch.isfinite(ours).all(), f"{label}: not finite"
    error, measure = (largest_error(t.double(), exact) for t in (ours, theirs))
    allowed = allowed_error(measure, exact, ours.dtype)
    assert error <= allowed, f"{label}: error {error:.3e}, PyTorch's {measure:.3e}"


def assert_small_rms(ours, theirs, exact, label=""):
    """For sums over many rows: the relative root-mean-square error stays under 0.005.

    Where the exact sum is nothing but cancellation, PyTorch's own error is the measure.
    """
    ours, theirs = (((t.double() - exact).norm() / exact.norm()).item() for t in (ours, theirs))
    assert ours < max(0.005, 2 * theirs), f"{label}: relative RMS error {ours:.2e}"


def forward_backward(f, inputs, upstream):
    """f's outputs and its inputs' gradients, on copies of the inputs in their own dtype."""
    return outputs_and_gradients(f, leaves_of(inputs), upstream)


def check_operation(ours, theirs, inputs, upstream):
    """Outputs and gradients of ours against float64, with PyTorch's form as the measure."""
    exact = forward_backward(theirs, [t.double() for t in inputs], upstream)
    mine = forward_backward(ours, inputs, upstream)
    torchs = forward_backward(theirs, inputs, upstream)
    with torch.no_grad():
        plain = ours(*inputs)
    plain = as_tuple(plain)
    for i, y in enumerate(plain):
        assert_as_exact(y, torchs[i], exact[i], f"output {i} without gradient")
    for i, (m, t, e) in enumerate(zip(mine, torchs, exact, strict=True)):
        label = f"output {i}" if i < len(plain) else f"gradient {i - len(plain)}"
        assert_as_exact(m, t, e, label)
        if e.norm() > 0:
            assert_small_rms(m, t, e, label)


def opcheck(operation, arguments):
    """``torch.library.opcheck``, without the warning that its own look at ``.grad`` gives."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        torch.library.opcheck(operation, arguments)
