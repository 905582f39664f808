"""The GPT of "Build a Large Language Model (From Scratch)", chapter 4, made fast."""

import warnings as _warnings

from fastgpt import cpu, ops
from fastgpt._distribution import conflict as _conflict
from fastgpt._version import __version__
from fastgpt.batch_invariance import batch_invariant
from fastgpt.config import GPT_CONFIG_124M
from fastgpt.dispatch import BackendError, BackendWarning, backends, use_backend
from fastgpt.model.accelerate import accelerate
from fastgpt.model.batch_generation import generate_batch, generate_batch_stream
from fastgpt.model.cache import KVCache
from fastgpt.model.explanation import explain
from fastgpt.model.generation import generate, generate_stream, generate_text_simple
from fastgpt.model.gpt import GPTModel
from fastgpt.model.modules import GELU, FeedForward, LayerNorm, MultiHeadAttention, TransformerBlock
from fastgpt.model.quantize import quantize
from fastgpt.model.scoring import score
from fastgpt.weights import WeightsError, load_weights, load_weights_into_gpt

if _sentence := _conflict():
    _warnings.warn(_sentence, stacklevel=2)

__all__ = [
    "GELU",
    "GPT_CONFIG_124M",
    "BackendError",
    "BackendWarning",
    "FeedForward",
    "GPTModel",
    "KVCache",
    "LayerNorm",
    "MultiHeadAttention",
    "TransformerBlock",
    "WeightsError",
    "__version__",
    "accelerate",
    "backends",
    "batch_invariant",
    "cpu",
    "explain",
    "generate",
    "generate_batch",
    "generate_batch_stream",
    "generate_stream",
    "generate_text_simple",
    "load_weights",
    "load_weights_into_gpt",
    "ops",
    "quantize",
    "score",
    "use_backend",
]
