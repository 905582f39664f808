"""What an installed fastgpt does, away from its source: `python tests/smoke.py [--no-extension]`.

Run in the environment that it was installed into. The wheels' tests run it too (pyproject.toml).
"""

import sys

import torch

import fastgpt
from fastgpt import reference

config = {
    "vocab_size": 61,
    "context_length": 32,
    "emb_dim": 48,
    "n_heads": 3,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": True,
}
torch.manual_seed(123)
ours, book = fastgpt.GPTModel(config).eval(), reference.GPTModel(config).eval()
book.load_state_dict(ours.state_dict())
ids = torch.randint(config["vocab_size"], (2, 24))
with torch.no_grad():
    torch.testing.assert_close(ours(ids), book(ids), rtol=1e-5, atol=1e-5)
prompt, n_tokens, context = ids[:, :4], 8, config["context_length"]
tokens = fastgpt.generate_text_simple(ours, prompt, n_tokens, context)
assert torch.equal(tokens, reference.generate_text_simple(book, prompt, n_tokens, context))

cpu = fastgpt.backends()["cpu"]
print(f"fastgpt {fastgpt.__version__} in {fastgpt.__file__}")
print(f"cpu backend: {cpu.detail if cpu.available else cpu.reason}")
assert "site-packages" in fastgpt.__file__, "this is not an installed fastgpt"
assert cpu.available is ("--no-extension" not in sys.argv)
assert cpu.available or cpu.reason
