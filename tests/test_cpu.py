import os
import platform
import subprocess
import sys
import threading

import pytest
import torch

import fastgpt
from fastgpt import cpu, ops
from fastgpt.cpu import workspace

pytestmark = pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing))


def _run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="no such list of features"
)
def test_instruction_sets_are_those_of_the_processor():
    with open("/proc/cpuinfo") as file:
        flags = {word for line in file if line.startswith("flags") for word in line.split()}
    needed = {"baseline": set(), "avx2": {"avx2", "fma", "f16c"}}
    needed["avx512"] = needed["avx2"] | {"avx512f", "avx512dq", "avx512bw", "avx512vl"}
    needed["avx512_bf16"] = needed["avx512"] | {"avx512_bf16", "avx512_vnni"}
    assert cpu.isas() == [name for name in needed if needed[name] <= flags]


def test_instruction_sets():
    names = cpu.isas()
    arm = platform.machine() in ("aarch64", "arm64")
    assert names[0] == ("neon" if arm else "baseline")
    assert cpu.isa() in names
    for name in names:
        with cpu.use_isa(name):
            assert cpu.isa() == name
    with pytest.raises(ValueError, match="no-such"), cpu.use_isa("no-such"):
        pass


def test_the_best_instruction_set_is_the_default():
    environment = {"FASTGPT_CPU_ISA": ""}
    run = _run("import fastgpt; print(fastgpt.cpu.isa())", **environment)
    assert run.stdout.strip() == cpu.isas()[-1]


@pytest.mark.parametrize("name", cpu.isas())
def test_environment_forces_an_instruction_set(name):
    code = "import fastgpt, torch; fastgpt.ops.gelu(torch.ones(3)); print(fastgpt.cpu.isa())"
    assert _run(code, FASTGPT_CPU_ISA=name).stdout.strip() == name


def test_environment_names_an_instruction_set_that_cannot_run():
    run = _run("import fastgpt, torch; fastgpt.ops.gelu(torch.ones(3))", FASTGPT_CPU_ISA="sse9")
    assert run.returncode != 0
    assert "FASTGPT_CPU_ISA" in run.stderr
    assert "sse9" in run.stderr


def test_workspaces_do_on_any_instruction_set(monkeypatch):
    """Another thread may make another one active before a workspace is used."""
    asked, ask = [], cpu._C.forward_workspace
    monkeypatch.setattr(cpu._C, "forward_workspace", lambda *args: asked.append(args) or ask(*args))
    sizes = {"vocab_size": 17, "context_length": 70, "emb_dim": 80, "n_heads": 5, "n_layers": 1}
    model = fastgpt.GPTModel(fastgpt.GPT_CONFIG_124M | sizes).eval()
    with torch.no_grad(), fastgpt.use_backend("cpu"):
        model(torch.zeros(1, 67, dtype=torch.int64))

    def floats():
        step = [1, 67, 80, 5, 16, 320, *[0] * 10]
        yield from (cpu._C.product_scratch(backward) for backward in (False, True))
        yield from (cpu._C.block_step_workspace(step, backward, 3) for backward in (False, True))
        yield cpu._C.linear_cross_entropy_workspace(67, 17, 3)
        yield ask(*asked[0])

    found = set()
    for isa in cpu.isas():
        with cpu.use_isa(isa):
            found.add(tuple(floats()))
    assert len(found) == 1


def test_use_isa_is_undone_after_an_error():
    before = cpu.isa()
    with pytest.raises(ZeroDivisionError), cpu.use_isa(cpu.isas()[0]):
        1 / 0  # noqa: B018
    assert cpu.isa() == before


def test_several_python_threads_at_once():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 200, 32).unbind(0)
    x, w = torch.randn(100, 256), torch.randn(256)
    expected = ops.causal_attention(q, k, v), ops.layer_norm(x, w, w), ops.gelu(x)
    wrong = []

    def work():
        for _ in range(20):
            got = ops.causal_attention(q, k, v), ops.layer_norm(x, w, w), ops.gelu(x)
            if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                wrong.append(got)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_threads_may_make_and_drop_models_between_any_two_lines():
    class Owner:
        pass

    owners = [Owner() for _ in range(4)]

    def meanwhile(frame, event, argument):
        """What another thread may do at each line of the one that is traced."""
        sys.settrace(None)
        owners.append(Owner())
        with workspace.workspace(owners[-1], 8), workspace.workspace(owners.pop(0), 8):
            pass
        sys.settrace(meanwhile)
        return meanwhile

    before = sys.gettrace()
    for _ in range(20):
        owner = Owner()
        sys.settrace(meanwhile)
        try:
            with workspace.workspace(owner, 8) as address:
                assert address != 0
        finally:
            sys.settrace(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_fork():
    """GNU OpenMP's threads do not survive a fork: a parallel region in the child would hang."""
    code = """
import os, torch, fastgpt
x = torch.randn(4000, 256)
y = fastgpt.ops.gelu(x)
child = os.fork()
if child == 0:
    again = fastgpt.ops.gelu(x)
    torch.set_num_threads(1)  # torch's own operations would hang in the child
    os._exit(0 if torch.equal(again, y) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(fastgpt.ops.gelu(x), y)
"""
    # Python 3.12 warns of a fork beside threads; here it is the point.
    run = _run("import warnings; warnings.simplefilter('ignore', DeprecationWarning)" + code)
    assert run.returncode == 0, run.stderr


def test_the_interpreter_runs_on_while_a_kernel_works():
    q = torch.randn(1, 4, 3000, 32)
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    ops.causal_attention(q, q, q)
    done.set()
    thread.join()
    assert ticks


def test_table_names_the_active_set():
    assert cpu.isa() in fastgpt.backends()["cpu"].detail
