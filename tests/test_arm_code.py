"""The hot loops' machine code on aarch64: fused multiply-adds of vectors, no spilled registers."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

setuptools = pytest.importorskip("setuptools")
pytest.importorskip("pybind11")  # setup.py's
ROOT = Path(__file__).resolve().parents[1]
COMPILER, DISASSEMBLER = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump"
MISSING = [tool for tool in (COMPILER, DISASSEMBLER) if not shutil.which(tool)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

# The functions that hold the products' inner loops, and the fused multiply-adds of a step.
LOOPS = {
    "tile<Single, 8, 3, false>": 24,
    "tile<Single, 8, 3, true>": 24,
    "dot_tile<Single, float, 1, 4>": 4,
    "dot_tile<Single, float, 8, 3>": 24,
    "attention_product_fixed<Single, 6, 4, false, false, false>": 24,
    "attention_product_fixed<Single, 6, 4, true, false, false>": 24,
    "attention_product_fixed<Single, 6, 4, true, true, false>": 24,
}


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """Each function's instructions, (address, text), compiled with setup.py's flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_PYTHON_HOST_PLATFORM", "linux-aarch64")
        patch.setattr(setuptools, "setup", lambda **_: None)
        build = runpy.run_path(str(ROOT / "setup.py"))
    isa, flags = list(build["ISAS"].items())[-1]
    compiled = tmp_path_factory.mktemp("arm") / "kernels.o"
    flags = ["-std=c++17", f"-DFASTGPT_ISA={isa}", *build["compile_args"], *flags]
    subprocess.run(
        [COMPILER, "-fPIC", *flags, "-c", "csrc/kernels.cpp", "-o", compiled], cwd=ROOT, check=True
    )
    listing = subprocess.run(
        [DISASSEMBLER, "-dC", "--no-show-raw-insn", compiled],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {}
    for line in listing.splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            name = head[1].replace(f"fastgpt::{isa}::", "").removeprefix("void ")
            code = found[name.partition("(")[0]] = []
        elif instruction := re.match(r" *([0-9a-f]+):\t(.*)", line):
            code.append((int(instruction[1], 16), instruction[2].replace("\t", " ")))
    return found


def loops(code):
    """The innermost loops of a function, each as its instructions."""
    place = {address: i for i, (address, _) in enumerate(code)}
    before = [[] for _ in code]  # the instructions that may come right before each
    for i, (_, text) in enumerate(code):
        jump = re.match(r"(?:b\.\w+|b|cbn?z|tbn?z) (?:.*, )?([0-9a-f]+) <", text)
        if jump and int(jump[1], 16) in place:
            before[place[int(jump[1], 16)]].append(i)
        if i + 1 < len(code) and not re.match(r"(b|br|ret)\b(?!\.)", text):
            before[i + 1].append(i)
    bodies = {}
    for head in (i for i, origins in enumerate(before) if origins != [i - 1]):
        for origin in before[head]:
            body, todo = {head}, [origin]
            while todo:
                if (i := todo.pop()) not in body:
                    body.add(i)
                    todo += before[i]
            if 0 not in body:  # all ways to this jump lead through its target
                bodies[head] = bodies.get(head, set()) | body
    inner = [body for head, body in bodies.items() if not body & (bodies.keys() - {head})]
    return [[code[i][1] for i in sorted(body)] for body in inner]


def fused(loop):
    return sum(text.startswith("fmla v") for text in loop)


@pytest.mark.parametrize(("function", "per_step"), LOOPS.items(), ids=LOOPS)
def test_hot_loop(functions, function, per_step):
    assert function in functions, f"none of {sorted(f for f in functions if 'Single' in f)}"
    loop = max(loops(functions[function]), key=lambda loop: (fused(loop), -len(loop)), default=[])
    listing = "\n".join(loop)
    assert fused(loop) > 0, listing
    assert fused(loop) % per_step == 0, listing
    assert not re.search(r"^(fn?m(ul|add|sub)|fadd|fmla) s", listing, re.M), f"scalar:\n{listing}"
    assert not re.search(r"\[(sp|x29)\b", listing), f"on the stack:\n{listing}"
