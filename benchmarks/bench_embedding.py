"""GPT-2's token and position embeddings and their gradients, [B, T] ids to [B, T, 768]."""

import torch
from torch.nn import functional as F

from benchmarks.cases import benchmark_of, gradients
from fastgpt import ops

VOCABULARY, CONTEXT, WIDTH = 50257, 1024, 768


def embedding(B, T):
    idx = torch.randint(VOCABULARY, (B, T))
    forms = {
        "reference": lambda tok, pos: F.embedding(idx, tok) + F.embedding(torch.arange(T), pos),
        "fastgpt": lambda tok, pos: ops.embedding(idx, tok, pos),
    }
    return forms, [torch.randn(VOCABULARY, WIDTH), torch.randn(CONTEXT, WIDTH)]


CASES = gradients(embedding, [(2, 512), (8, 1024)])
test_embedding = benchmark_of(CASES, ("reference", "compile", "fastgpt"))
