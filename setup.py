"""Builds fastgpt._C: the bindings once, the kernels once for each instruction set.

Everything else about the package stands in pyproject.toml. The extension is optional: where it
cannot be built the package installs without it, and fastgpt.backends() says so.
"""

import os
import platform
import shutil
import sys
import sysconfig
from multiprocessing.pool import ThreadPool
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from pybind11.setup_helpers import build_ext as pybind11_build_ext
from setuptools import setup
from setuptools.errors import CompileError

PLATFORM = sysconfig.get_platform()
WINDOWS = PLATFORM.startswith("win-")
# With a Python for both kinds of Mac, the build of this one.
if PLATFORM.endswith("universal2") and "ARCHFLAGS" not in os.environ:
    PLATFORM = platform.machine()
    os.environ["ARCHFLAGS"] = f"-arch {PLATFORM}"
X86 = PLATFORM.endswith(("x86_64", "amd64"))
ARM64 = PLATFORM.endswith(("aarch64", "arm64"))
SANITIZE = os.environ.get("FASTGPT_SANITIZE")

ISAS = {"neon" if ARM64 else "baseline": []}
if ARM64 and sys.platform == "linux":
    ISAS["neon"] = ["-fno-schedule-insns"]  # GCC's first scheduling pass spills sums
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
    ISAS["avx512"] = [*ISAS["avx2"], *avx512]
    # .. with dot products of bfloat16 pairs and of int8.
    ISAS["avx512_bf16"] = [*ISAS["avx512"], "-mavx512bf16", "-mavx512vnni"]

# Contraction would make the baseline's rounding depend on the compiler's target.
if WINDOWS:  # clang-cl, whose -Wall is every warning that it has; setuptools asks for /O2 and /W3
    compile_args, link_args = ["-Wextra", "/clang:-ffp-contract=off"], []
    compile_args += ["/openmp"] if X86 else []
else:
    compile_args, link_args = ["-O3", "-Wall", "-Wextra", "-ffp-contract=off"], ["-pthread"]
    if sys.platform != "darwin":
        link_args.append("-ldl")
if SANITIZE:  # "address,undefined" or "thread"
    flags = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    # Python's own -fwrapv would make signed overflow legal, and the compiler four times as slow.
    compile_args += ["-g1", "-fno-var-tracking", "-O1", "-fno-wrapv", *flags]
    link_args += flags


# Makes products of many rows. OpenBLAS shows on Linux that the code for Accelerate is right.
BLAS = os.environ.get("FASTGPT_BLAS") or ("Accelerate" if sys.platform == "darwin" else "none")
macros = [("FASTGPT_X86", "1")] if X86 else []
if SANITIZE == "thread" or os.environ.get("FASTGPT_OPENMP") == "0":
    macros.append(("FASTGPT_OWN_THREADS", "1"))  # ThreadSanitizer doesn't see how OpenMP's wait
if BLAS == "Accelerate":
    macros += [("FASTGPT_BLAS", '"Accelerate"'), ("FASTGPT_SGEMM", "cblas_sgemm")]
    link_args += ["-framework", "Accelerate"]
elif BLAS == "OpenBLAS":
    import scipy_openblas32

    macros += [("FASTGPT_BLAS", '"OpenBLAS"'), ("FASTGPT_SGEMM", "scipy_cblas_sgemm")]
    macros.append(("FASTGPT_OPENBLAS", "1"))
    folder = scipy_openblas32.get_lib_dir()
    link_args += [f"-L{folder}", f"-Wl,-rpath,{folder}", f"-l{scipy_openblas32.get_library()}"]
elif BLAS != "none":
    raise SystemExit(f"FASTGPT_BLAS={BLAS}: it is Accelerate, OpenBLAS or none")


class build_ext(pybind11_build_ext):
    """Adds one object of kernels.cpp for each instruction set, compiled side by side."""

    def use_clang_cl(self, ext):
        clang_cl = shutil.which("clang-cl")
        if clang_cl is None:  # Microsoft's own compiler has no pragma to unroll a loop
            raise CompileError("clang-cl is not on the PATH (LLVM's installer for Windows has it)")
        self.compiler.initialize(self.plat_name)
        self.compiler.cc = clang_cl
        if X86:  # the OpenMP runtime in torch's wheels: importing torch has loaded it
            library = os.path.join(self.build_temp, "libiomp5md.lib")
            self.mkpath(self.build_temp)
            made = ["/def:csrc/libiomp5md.def", "/machine:x64", f"/out:{library}"]
            self.spawn([self.compiler.lib, "/nologo", *made])
            ext.extra_objects.append(library)

    def build_extension(self, ext):
        if WINDOWS:
            self.use_clang_cl(ext)

        def objects(isa):
            return self.compiler.compile(
                ["csrc/kernels.cpp"],
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("FASTGPT_ISA", isa), *ext.define_macros],
                extra_postargs=[*ext.extra_compile_args, *ISAS[isa]],
            )

        with ThreadPool(os.cpu_count()) as pool:
            for made in pool.map(objects, ISAS):
                ext.extra_objects += made
        super().build_extension(ext)


extension = Pybind11Extension(
    "fastgpt._C",
    ["csrc/bindings.cpp", "csrc/threads.cpp"],
    depends=["csrc/kernels.cpp", *map(str, sorted(Path("csrc").glob("*.h")))],
    define_macros=macros,
    extra_compile_args=compile_args,
    extra_link_args=link_args,
    cxx_std=17,
    optional=True,
)
no_extension = os.environ.get("FASTGPT_NO_EXT") == "1"
setup(ext_modules=[] if no_extension else [extension], cmdclass={"build_ext": build_ext})
