"""Every kernel in every shipped setting compiles for each architecture, fits it, spills nothing,
and uses what it was written to use.
"""

import importlib

import pytest
import torch

from on_triton.support import gpu

OPERATIONS = ["layer_norm", "gelu", "embedding", "cross_entropy", "linear_cross_entropy", "linear"]
OPERATIONS += ["causal_attention", "decode_attention", "dropout", "quantized_linear"]
OPERATIONS += ["linear_rows", "decode_step"]


def cases():
    found = []
    for op in OPERATIONS:
        for name, case in importlib.import_module(f"on_triton.test_{op}").CASES.items():
            for arch in case.archs:
                for dtype in case.dtypes:
                    label = str(dtype).removeprefix("torch.")
                    found.append(pytest.param(case, arch, dtype, id=f"{op}-{name}-{arch}-{label}"))
    return found


@pytest.mark.parametrize(("case", "arch", "dtype"), cases())
def test_compiled(case, arch, dtype, capfd):
    with gpu.fake_gpu(arch) as launches:
        case.run(dtype)
    assert launches
    for launch in launches:
        found = gpu.resources(launch.compiled)
        assert found.shared <= gpu.SHARED_MEMORY[arch], f"{launch.name}: {found.shared} bytes"
        assert found.spilled == 0, f"{launch.name}: spills {found.spilled} of {found.registers}"
        if launch.name in case.matrix and dtype != torch.float32:
            assert gpu.MATRIX[arch] in found.assembly, f"{launch.name}: no {gpu.MATRIX[arch]}"
        if launch.name in case.wide:
            assert gpu.reads_16_bytes(found.assembly), f"{launch.name}: no 16-byte loads"
    missing = {*case.matrix, *case.wide} - {launch.name for launch in launches}
    assert not missing, f"never launched: {missing}"
    # What AMD's code generator cannot do is printed, not raised.
    assert "error:" not in capfd.readouterr().err
