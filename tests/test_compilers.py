"""The C++ sources under clang and MinGW. For Windows and macOS they are compiled, not run."""

import contextlib
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("pybind11", reason="setup.py needs it")
ROOT = Path(__file__).resolve().parents[1]
BUILDS = ("baseline", "avx2", "avx512", "avx512_bf16")
CLANG, MINGW = "clang++", "x86_64-w64-mingw32-g++-posix"
# What the kernels include, for targets whose own headers are not here; windows.h has the macros
# that break them.
HEADERS = {
    "cstdint": "#include <stdint.h>\n",
    "cstdlib": "#include <stdlib.h>\nnamespace std { using ::malloc; using ::free; }\n",
    "cstring": "#include <string.h>\nnamespace std { using ::memcpy; using ::memset; }\n",
    "stdlib.h": '#include <stddef.h>\nextern "C" void *malloc(size_t), free(void*);\n',
    "string.h": """\
#include <stddef.h>
extern "C" void *memcpy(void*, const void*, size_t), *memset(void*, int, size_t);
""",
    "math.h": """\
#define INFINITY __builtin_inff()
extern "C" float sqrtf(float), expf(float), logf(float);
""",
    "atomic": """\
namespace std {
enum memory_order {
    memory_order_relaxed, memory_order_acquire, memory_order_release, memory_order_acq_rel,
    memory_order_seq_cst
};
template <class T>
struct atomic {
    atomic() = default;
    constexpr atomic(T t) : value(t) {}
    T load(memory_order = memory_order_seq_cst) const { return value; }
    void store(T t, memory_order = memory_order_seq_cst) { value = t; }
    T fetch_add(T t, memory_order = memory_order_seq_cst) { return (value += t) - t; }
    bool compare_exchange_weak(T& t, T next, memory_order = memory_order_seq_cst) {
        return value == t ? value = next, true : (t = value, false);
    }
    T value;
};
}
""",
    "windows.h": """\
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define small char
#define near
#define far
extern "C" int SwitchToThread();
""",
}


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headers")
    for name, text in HEADERS.items():
        (folder / name).write_text("#pragma once\n" + text)
    return folder


def setup_on(platform, system):
    """The names in setup.py as it runs on another system; nothing is built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_platform", lambda: platform)
        patch.setattr(sys, "platform", system)
        patch.setattr(os, "environ", {**os.environ})
        if system == "win32":
            patch.setattr("pybind11.setup_helpers.WIN", True)
            patch.setattr("pybind11.setup_helpers.STD_TMPL", "/std:c++{}")
        patch.setattr("setuptools.setup", lambda **_: None)
        patch.chdir(ROOT)
        return runpy.run_path("setup.py")


LINUX = setup_on("linux-x86_64", "linux")
WINDOWS = setup_on("win-amd64", "win32")
MACOS = setup_on("macosx-11.0-arm64", "darwin")


def compiled(compiler, *arguments):
    """Compiles; a warning is an error."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    command = [compiler, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def kernels(setup, build):
    """setup.py's flags for the kernels of one build; pybind11 has added the C++ standard."""
    macros = [f"-D{name}={value}" for name, value in setup["macros"]]
    return [*setup["compile_args"], *setup["ISAS"][build], *macros, f"-DFASTGPT_ISA={build}"]


@pytest.mark.parametrize("build", BUILDS)
def test_clang_unrolls_the_kernels_without_a_warning(build, tmp_path):
    flags = ["--target=x86_64-linux-gnu", "-Werror", *kernels(LINUX, build)]
    compiled(CLANG, *flags, "-c", "csrc/kernels.cpp", "-o", tmp_path / "kernels.o")


@pytest.mark.parametrize("build", BUILDS)
def test_the_kernels_compile_as_clang_cl_does(build, headers, tmp_path):
    """.. and ask the OpenMP runtime for nothing that the import library does not name."""
    made = tmp_path / "kernels.obj"
    cl = ["--driver-mode=cl", "--target=x86_64-pc-windows-msvc", "/X", f"/I{headers}"]
    cl += ["/clang:-ffreestanding", "/W3", "-Werror", "/Od"]
    compiled(CLANG, *cl, *kernels(WINDOWS, build), "/c", "csrc/kernels.cpp", f"/Fo{made}")
    called = set(re.findall(rb"(?<=\0)(?:__kmpc|omp)_\w+(?=\0)", made.read_bytes()))
    names = (ROOT / "csrc" / "libiomp5md.def").read_bytes().split(b"EXPORTS")[1].split()
    assert called == set(names)


def test_an_import_library_is_made_of_the_names(tmp_path):
    made, tool = tmp_path / "libiomp5md.a", "x86_64-w64-mingw32-dlltool"
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    source = ROOT / "csrc" / "libiomp5md.def"
    subprocess.run([tool, "-d", source, "-l", made], check=True)
    for name in source.read_bytes().split(b"EXPORTS")[1].split():
        assert b"__imp_" + name in made.read_bytes()


@pytest.mark.parametrize("build", BUILDS)
def test_the_kernels_compile_with_mingw(build, tmp_path):
    flags = ["-Werror", *kernels(LINUX, build), "-O0", "-c", "csrc/kernels.cpp"]
    compiled(MINGW, *flags, "-o", tmp_path / "kernels.o")


def test_the_bindings_compile_with_mingw(tmp_path):
    """.. over the headers of this Python, told that it is one of Windows."""
    import pybind11

    include = Path(sysconfig.get_path("include"))
    if not (include / "pyconfig.h").exists():
        pytest.skip("Python's headers are not installed")
    here = re.findall(r"^#define (HAVE_\w+)", (include / "pyconfig.h").read_text(), re.M)
    lines = ["#include <pyconfig.h>", *(f"#undef {name}" for name in here)]
    for name, value in {"SIZEOF_LONG": 4, "SIZEOF_WCHAR_T": 2}.items():
        lines += [f"#undef {name}", f"#define {name} {value}"]
    lines += [f"#define {name} 1" for name in ("MS_WINDOWS", "MS_WIN64", "NT_THREADS")]
    (tmp_path / "windows_python.h").write_text("\n".join(lines) + "\n")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-DFASTGPT_X86=1", "-fsyntax-only"]
    flags += ["-include", tmp_path / "windows_python.h"]
    for folder in (include, pybind11.get_include()):
        flags += ["-isystem", folder]
    compiled(MINGW, *flags, "csrc/bindings.cpp")


def test_threads_of_our_own_compile_with_mingw():
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    compiled(MINGW, *flags, "csrc/threads.cpp")


def test_the_kernels_compile_for_macos(headers, tmp_path):
    flags = ["--target=arm64-apple-macos11", "-nostdlibinc", "-nostdinc++", "-ffreestanding"]
    flags += ["-isystem", headers, "-Werror", *kernels(MACOS, "neon"), "-O0"]
    compiled(CLANG, *flags, "-c", "csrc/kernels.cpp", "-o", tmp_path / "kernels.o")


@pytest.mark.parametrize(("machine", "isas"), [("arm64", ["neon"]), ("x86_64", [*BUILDS])])
def test_a_python_for_both_macs_gets_the_build_of_this_one(machine, isas, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    setup = setup_on("macosx-10.13-universal2", "darwin")
    assert [*setup["ISAS"]] == isas
    assert setup["PLATFORM"] == machine


class Compiler:
    """A stand-in for setuptools' compiler on Windows."""

    lib = "lib.exe"

    def initialize(self, plat_name):
        self.cc = "cl.exe"


@pytest.mark.parametrize("installed", [True, False])
def test_windows_is_built_with_clang_cl_alone(installed, monkeypatch, tmp_path):
    from setuptools import Distribution, Extension
    from setuptools.errors import CompileError

    build, extension = WINDOWS["build_ext"](Distribution()), Extension("fastgpt._C", [])
    build.compiler, build.build_temp, spawned = Compiler(), str(tmp_path / "temp"), []
    monkeypatch.setattr(build, "spawn", spawned.append)
    monkeypatch.setattr(shutil, "which", lambda name: f"C:\\LLVM\\{name}" if installed else None)
    no_compiler = pytest.raises(CompileError, match="clang-cl is not on the PATH")
    with contextlib.nullcontext() if installed else no_compiler:
        build.use_clang_cl(extension)
    if installed:
        assert build.compiler.cc == "C:\\LLVM\\clang-cl"
        ((command, *options),) = spawned
        assert command == "lib.exe"
        assert "/def:csrc/libiomp5md.def" in options
        assert [f"/out:{library}" for library in extension.extra_objects] == options[-1:]
    else:
        assert not spawned
