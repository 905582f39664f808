"""A GPU that is not there: launchers run against it, and each kernel they launch is compiled.

`fake_gpu(arch)` records every launch with the compiled kernel, whose registers, shared memory and
instructions `resources` reads. Tensors made inside it hold no memory. They say that they are on the
CPU: a torch without CUDA cannot index one that says otherwise, and launchers do not ask.
"""

import contextlib
import re
import subprocess
import tempfile
import warnings
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastgpt.triton import launch_table


class Architecture(NamedTuple):
    multiprocessors: int
    shared: int  # the most that a program gets, in KiB
    matrix: str  # the tensor cores' instruction, in PTX or AMD's assembly
    warp: int = 32
    threads: int = 2048  # that a multiprocessor holds


ARCHS = {
    "sm_80": Architecture(108, 163, "mma.sync"),  # A100
    "sm_86": Architecture(84, 99, "mma.sync", threads=1536),  # RTX 30, A10, A40
    "sm_89": Architecture(128, 99, "mma.sync", threads=1536),  # RTX 40, L4
    "sm_90": Architecture(132, 227, "wgmma.mma_async"),  # H100
    "sm_100": Architecture(148, 227, "tcgen05.mma"),  # B200
    "sm_120": Architecture(170, 99, "mma.sync", threads=1536),  # RTX 50
    "gfx90a": Architecture(104, 64, "v_mfma", 64),  # MI200
    "gfx942": Architecture(304, 64, "v_mfma", 64),  # MI300
    "gfx1100": Architecture(96, 64, "v_wmma"),  # RX 7900
}


class Launch(NamedTuple):
    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the kernel's own names, and num_warps and the like
    compiled: Any


class _Driver(DriverBase):
    def __init__(self, arch):
        self.arch = arch
        amd = arch.startswith("gfx")
        kind, name = ("hip", arch) if amd else ("cuda", int(arch[3:]))
        self.target = GPUTarget(kind, name, ARCHS[arch].warp)

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, kind):
        return "void*"

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_current_device(self):
        # Compiled kernels are kept by this number: one for each architecture.
        return 1000 + list(ARCHS).index(self.arch)

    def get_current_stream(self, device=0):
        return 0

    def get_benchmarker(self):
        raise NotImplementedError("nothing is tuned at run time")


_RUN = JITFunction.run  # not the interpreter's


@contextlib.contextmanager
def fake_gpu(arch):
    """Launches inside it compile for that architecture and run nothing; yields the list of them."""
    launches = []

    def launch(kernel, *args, grid, warmup, **kwargs):
        arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        size = grid(arguments) if callable(grid) else grid
        compiled = _RUN(kernel, *args, grid=size, warmup=True, **kwargs)
        if not warmup:
            launches.append(Launch(kernel.__name__, tuple(size), arguments, compiled))
        return compiled

    device = launch_table.Device(arch, ARCHS[arch].multiprocessors)
    run, of, active = JITFunction.run, launch_table.device_of, driver._active
    JITFunction.run, launch_table.device_of = launch, lambda x: device
    driver.set_active(_Driver(arch))
    try:
        with FakeTensorMode(), warnings.catch_warnings():
            # Triton asks every tensor how its address is aligned; a fake one answers 0.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield launches
    finally:
        JITFunction.run, launch_table.device_of, driver._active = run, of, active


class Unaligned:
    """So many numbers, part of some longer tensor; those made inside `fake_gpu` all pass for
    aligned.
    """

    dtype = torch.int32

    def __init__(self, length=1):
        self._length = length

    def __len__(self):
        return self._length

    def data_ptr(self):
        return 4


class Resources(NamedTuple):
    shared: int  # bytes a program
    registers: int  # a thread
    spilled: int  # bytes of stack a thread, or spilled registers on AMD
    assembly: str  # PTX, or AMD's


def resources(compiled):
    """What a compiled kernel takes, read from its binary."""
    shared = compiled.metadata.shared
    if "hsaco" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{key}:\s*(\d+)", assembly)[1])
            for key in ("vgpr_count", "vgpr_spill_count")
        )
        return Resources(shared, registers, spilled, assembly)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Resources(shared, registers, stack, compiled.asm["ptx"])


def at_once(arch, compiled):
    """How many programs of a compiled kernel NVIDIA's GPU of that architecture runs at once."""
    gpu, found, warps = ARCHS[arch], resources(compiled), compiled.metadata.num_warps
    # A warp's registers come in pieces of 256, and a program takes 1 KiB of shared memory besides
    # its own, of 1 KiB more than one program gets.
    registers = 65536 // (warps * -(-found.registers * 32 // 256) * 256)
    shared = (gpu.shared + 1) * 1024 // (found.shared + 1024)
    return gpu.multiprocessors * min(registers, shared, gpu.threads // (32 * warps))


def reads_16_bytes(assembly):
    """Whether global memory is read 16 bytes at a time, directly or into shared memory."""
    return bool(
        re.search(
            r"(?<![a-z0-9.])(ld\.global[a-z0-9_.:]*\.v4\.[bf]32|ld\.global[a-z0-9_.:]*\.v2\.b64"
            r"|cp\.async\.cg|cp\.async\.bulk\.tensor|(global|buffer)_load_(dwordx4|b128))",
            assembly,
        )
    )
