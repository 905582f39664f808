"""Builds fastgpt._C: the bindings once, the kernels once for each instruction set.

Everything else about the package stands in pyproject.toml. The extension is optional: where it
cannot be built the package installs without it, and fastgpt.backends() says so.
"""

import os
import sys
import sysconfig
from multiprocessing.pool import ThreadPool
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from pybind11.setup_helpers import build_ext as pybind11_build_ext
from setuptools import setup

MSVC = sys.platform == "win32"
X86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
ARM64 = not MSVC and sysconfig.get_platform().endswith(("aarch64", "arm64"))
SANITIZE = os.environ.get("FASTGPT_SANITIZE") == "1"

ISAS = {"neon" if ARM64 else "baseline": []}
if ARM64 and sys.platform == "linux":
    ISAS["neon"] = ["-fno-schedule-insns"]  # GCC's first scheduling pass spills sums
if X86:
    ISAS["avx2"] = ["/arch:AVX2"] if MSVC else ["-mavx2", "-mfma", "-mf16c"]
    avx512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
    # GCC 12 finds its own AVX-512 header at fault.
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    ISAS["avx512"] = ["/arch:AVX512"] if MSVC else [*ISAS["avx2"], *avx512, *quiet]
    # .. with dot products of bfloat16 pairs and of int8.
    if not MSVC:  # which casts between registers of these types otherwise
        ISAS["avx512_bf16"] = [*ISAS["avx512"], "-mavx512bf16", "-mavx512vnni"]

if MSVC:
    compile_args, link_args = ["/O2", "/openmp"], []
elif sys.platform == "darwin":  # Apple's compiler has no OpenMP: one thread there
    compile_args, link_args = ["-O3"], []
else:
    compile_args, link_args = ["-O3", "-fopenmp"], ["-fopenmp"]
if SANITIZE:
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    compile_args += ["-g", "-O1", *flags]
    link_args += flags
if not MSVC:
    # Contraction would make the baseline's rounding depend on the compiler's target.
    compile_args += ["-Wall", "-Wextra", "-ffp-contract=off"]


class build_ext(pybind11_build_ext):
    """Adds one object of kernels.cpp for each instruction set, compiled side by side."""

    def build_extension(self, ext):
        def objects(isa):
            return self.compiler.compile(
                ["csrc/kernels.cpp"],
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("FASTGPT_ISA", isa)],
                extra_postargs=[*ext.extra_compile_args, *ISAS[isa]],
            )

        with ThreadPool(os.cpu_count()) as pool:
            for made in pool.map(objects, ISAS):
                ext.extra_objects += made
        super().build_extension(ext)


extension = Pybind11Extension(
    "fastgpt._C",
    ["csrc/bindings.cpp"],
    depends=["csrc/kernels.cpp", *map(str, sorted(Path("csrc").glob("*.h")))],
    define_macros=[("FASTGPT_X86", "1")] if X86 else [],
    extra_compile_args=compile_args,
    extra_link_args=link_args,
    cxx_std=17,
    optional=True,
)
no_extension = os.environ.get("FASTGPT_NO_EXT") == "1"
setup(ext_modules=[] if no_extension else [extension], cmdclass={"build_ext": build_ext})
