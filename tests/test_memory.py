"""Peak sizes, each in a process of its own, at the real size of GPT-2 124M."""

import os
import subprocess
import sys

import pytest

from fastgpt import cpu

pytestmark = [
    pytest.mark.skipif(cpu.missing is not None, reason=str(cpu.missing)),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

START = """
import resource, torch, fastgpt
def now():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def peak():  # not ru_maxrss, which starts at the size of the process that forked this one
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
torch.manual_seed(0)
model = fastgpt.GPTModel(fastgpt.GPT_CONFIG_124M | {"drop_rate": 0.0}).eval()
idx = torch.randint(0, 50257, (8, 1024))
"""


def _bytes(code, **environment):
    run = subprocess.run(
        [sys.executable, "-c", START + code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_a_forward_pass_takes_little_above_its_logits():
    code = """
with torch.no_grad():
    model(idx[:1, :8])
    before = now()
    logits = model(idx)
print(peak() - before - logits.nbytes)
"""
    assert _bytes(code) < 0.45e9


@pytest.mark.parametrize("prompt_lookup", [False, True])
def test_generating_does_not_grow(prompt_lookup):
    code = f"""
import itertools, time
ticks = itertools.count()
time.perf_counter = lambda: float(next(ticks))  # each time the same guesses
def generate(n):
    fastgpt.generate_text_simple(model, idx[:1, :40], n, 1024, {prompt_lookup})
sizes = []
for _ in range(7):
    generate(200)
    sizes.append(now())
print(sizes[-1] - sizes[0])
"""
    # glibc gives every larger block back at once then, instead of keeping some now and then.
    kept = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    assert _bytes(code, **kept) < 1e6


STEP = """
model.train()
model.out_head.weight = model.tok_emb.weight
idx = idx[:{batch}]
loss = {loss}
loss.backward()
print(peak())
"""
READERS = "torch.nn.functional.cross_entropy(model(idx).flatten(0, 1), idx.flatten())"


@pytest.mark.parametrize(
    ("batch", "loss", "gigabytes"),
    [(2, READERS, 3.6), (2, "model.loss(idx, idx)", 2.3), (8, "model.loss(idx, idx)", 6.0)],
    ids=["readers loop", "model.loss", "model.loss, batch 8"],
)
def test_a_training_step_fits(batch, loss, gigabytes):
    """The whole process."""
    assert _bytes(STEP.format(batch=batch, loss=loss)) < gigabytes * 1e9
