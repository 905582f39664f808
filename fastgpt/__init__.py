"""The GPT of "Build a Large Language Model (From Scratch)", chapter 4, at the speed of the machine."""

from fastgpt import cpu, ops
from fastgpt._version import __version__
from fastgpt.config import GPT_CONFIG_124M
from fastgpt.dispatch import BackendError, BackendWarning, backends, use_backend
from fastgpt.generate import generate_text_simple
from fastgpt.model import (
    GELU,
    FeedForward,
    GPTModel,
    LayerNorm,
    MultiHeadAttention,
    TransformerBlock,
)

__all__ = [
    "GELU",
    "GPT_CONFIG_124M",
    "BackendError",
    "BackendWarning",
    "FeedForward",
    "GPTModel",
    "LayerNorm",
    "MultiHeadAttention",
    "TransformerBlock",
    "__version__",
    "backends",
    "cpu",
    "generate_text_simple",
    "ops",
    "use_backend",
]
