"""The model of the book in plain PyTorch: the oracle of every test and the baseline of every
benchmark.

After "Build a Large Language Model (From Scratch)" by Sebastian Raschka (Manning, 2024), chapters 3
and 4: the same modules under the same names, the same order of parameters and of operations, and so
the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastgpt.config import GPT_CONFIG_124M

__all__ = [
    "GELU",
    "GPT_CONFIG_124M",
    "FeedForward",
    "GPTModel",
    "LayerNorm",
    "MultiHeadAttention",
    "TransformerBlock",
    "causal_attention",
    "gelu",
    "generate",
    "generate_text_simple",
    "layer_norm",
    "packed_causal_attention",
]


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalises the last dimension with the biased variance, then scales and shifts it."""
    mean = x.mean(dim=-1, keepdim=True)
    var = x.var(dim=-1, keepdim=True, unbiased=False)
    return scale * ((x - mean) / torch.sqrt(var + eps)) + shift


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU."""
    # In the book's order: autograd adds up a tensor's gradients in the order of its uses.
    root = torch.tensor(2.0 / math.pi)
    return 0.5 * x * (1 + torch.tanh(torch.sqrt(root) * (x + 0.044715 * torch.pow(x, 3))))


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: nn.Module | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D), hidden where mask) v, with dropout on the weights.

    q: [B, H, T, D]; k, v: [B, H, S, D]; mask: [T, S], true where a key is hidden. Returns [B, H, T,
        D].
    """
    scores = q @ k.transpose(2, 3)
    scores.masked_fill_(mask, -torch.inf)
    weights = torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1)
    if dropout is not None:
        weights = dropout(weights)
    return weights @ v


def packed_causal_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """``causal_attention`` of sequences of these lengths, each to see itself alone.

    q, k, v: [B, H, T, D], with the sequences one behind another along T. Returns the same shape.
    """
    attended = []
    parts = (t.split(lengths, dim=2) for t in (q, k, v))
    for q_one, k_one, v_one in zip(*parts, strict=True):
        T = q_one.shape[2]
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        attended.append(causal_attention(q_one, k_one, v_one, mask))
    return torch.cat(attended, dim=2)


class LayerNorm(nn.Module):
    def __init__(self, emb_dim):
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        return layer_norm(x, self.scale, self.shift, self.eps)


class GELU(nn.Module):
    def forward(self, x):
        return gelu(x)


class FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        width = cfg["emb_dim"]
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layers = nn.Sequential(up, GELU(), down)

    def forward(self, x):
        return self.layers(x)


class MultiHeadAttention(nn.Module):
    mask: Tensor

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        if d_out % num_heads != 0:
            raise ValueError(f"d_out {d_out} must be divisible by num_heads {num_heads}")
        self.d_out = d_out
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        ones = torch.ones(context_length, context_length)
        self.register_buffer("mask", torch.triu(ones, diagonal=1))

    def forward(self, x):
        B, T, _ = x.shape
        split = (B, T, self.num_heads, self.head_dim)
        k = self.W_key(x).view(split).transpose(1, 2)
        q = self.W_query(x).view(split).transpose(1, 2)
        v = self.W_value(x).view(split).transpose(1, 2)
        context = causal_attention(q, k, v, self.mask.bool()[:T, :T], self.dropout)
        return self.out_proj(context.transpose(1, 2).contiguous().view(B, T, self.d_out))


class TransformerBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.att = MultiHeadAttention(
            d_in=cfg["emb_dim"],
            d_out=cfg["emb_dim"],
            context_length=cfg["context_length"],
            num_heads=cfg["n_heads"],
            dropout=cfg["drop_rate"],
            qkv_bias=cfg["qkv_bias"],
        )
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg["emb_dim"])
        self.norm2 = LayerNorm(cfg["emb_dim"])
        self.drop_shortcut = nn.Dropout(cfg["drop_rate"])

    def forward(self, x):
        x = self.drop_shortcut(self.att(self.norm1(x))) + x
        return self.drop_shortcut(self.ff(self.norm2(x))) + x


class GPTModel(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, in_idx):
        _, T = in_idx.shape
        positions = torch.arange(T, device=in_idx.device)
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(positions))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


def generate_text_simple(model, idx, max_new_tokens, context_size):
    """Greedy decoding by a full forward of the last context_size tokens for each new one. idx: [B,
    T].
    """
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(idx[:, -context_size:])
        idx = torch.cat((idx, torch.argmax(logits[:, -1, :], dim=-1, keepdim=True)), dim=1)
    return idx


def generate(model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None, eos_id=None):
    """Chapter 5's decoding of one sequence: top-k, temperature, end of sequence. idx: [1, T]."""
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(idx[:, -context_size:])[:, -1, :]
        if top_k is not None:
            least = torch.topk(logits, top_k).values[:, -1]
            logits = torch.where(logits < least, torch.tensor(-torch.inf), logits)
        if temperature > 0.0:
            probabilities = torch.softmax(logits / temperature, dim=-1)
            new = torch.multinomial(probabilities, num_samples=1)
        else:
            new = torch.argmax(logits, dim=-1, keepdim=True)
        if new == eos_id:
            break
        idx = torch.cat((idx, new), dim=1)
    return idx
