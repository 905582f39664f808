"""The private names of torch: all in one file, and what happens with a torch that lacks one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt
from fastgpt import torch_state

PACKAGE = Path(fastgpt.__file__).parent
ITS_FILE = Path(torch_state.__file__)
# torch._C, torch.ops.mkldnn._x, from torch.utils import _pytree, from torch._dynamo import x
PRIVATE = re.compile(
    r"(?<![\w.])torch(\.\w+)*\._[a-z]\w*|(?<![\w.])torch(\.\w+)*\._C\b"
    r"|from torch[\w.]* import .*\b_[A-Za-z]\w*"
)


def test_this_torch_has_all_that_tells_what_watches_a_call():
    assert torch_state.lacking is None


@pytest.mark.parametrize(
    ("line", "private"),
    [
        ("x = torch._C._get_tracing_state()", True),
        ("except torch._dynamo.exc.TorchDynamoException:", True),
        ("torch.ops.mkldnn._linear_pointwise(x)", True),
        ("from torch._dynamo import exc", True),
        ("from torch.utils import weak, _pytree", True),
        ("from torch.utils.weak import WeakTensorKeyDictionary", False),
        ("self.torch._own", False),
        ("torch.nn.Module.__call__", False),
        ("torch_state._lacking()", False),
    ],
)
def test_what_counts_as_private(line, private):
    assert bool(PRIVATE.search(line)) is private


def test_private_names_of_torch_are_in_one_file():
    found = {
        file.relative_to(PACKAGE).as_posix(): match[0]
        for file in PACKAGE.rglob("*.py")
        if file != ITS_FILE and (match := PRIVATE.search(file.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    ("at", "name"),
    [
        ("torch._C", "_are_functorch_transforms_active"),
        ("torch.utils._python_dispatch", "_len_torch_dispatch_stack"),
    ],
)
def test_a_torch_that_lacks_a_name_runs_everything_on_its_own_operations(at, name):
    code = f"""
import torch, {at}
torchs_own = {at}.{name}
del {at}.{name}
import fastgpt
{at}.{name} = torchs_own  # torch calls it too
from fastgpt import reference
print(fastgpt.backends()["cpu"].reason)
cfg = dict(vocab_size=61, context_length=16, emb_dim=32, n_heads=2, n_layers=2, drop_rate=0.0,
           qkv_bias=False)
ours, book = fastgpt.GPTModel(cfg).eval(), reference.GPTModel(cfg).eval()
book.load_state_dict(ours.state_dict())
ids = torch.arange(8)[None]
torch.testing.assert_close(ours(ids), book(ids))
fastgpt.generate_text_simple(ours, ids, 3, 16)
ours.loss(ids[:, :-1], ids[:, 1:]).backward()
try:
    with fastgpt.use_backend("cpu"):
        pass
except fastgpt.BackendError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(f"has no {at}.") == 2
    assert run.stdout.count(name) == 2
    assert run.stderr.count("BackendWarning") == 1
