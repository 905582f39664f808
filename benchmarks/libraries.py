"""The book's GPT-2 in other libraries, with the same weights, and the bound on all of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def missing(*packages: str) -> str | None:
    """Which of these packages is not installed, in words; None where all are."""
    absent = [package for package in packages if find_spec(package) is None]
    return f"{', '.join(absent)} not installed" if absent else None


@torch.no_grad()
def hugging_face(book: nn.Module, cfg: dict[str, Any]) -> nn.Module:
    """transformers' GPT2LMHeadModel with a copy of the book's weights, in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=cfg["vocab_size"],
        n_positions=cfg["context_length"],
        n_embd=cfg["emb_dim"],
        n_layer=cfg["n_layers"],
        n_head=cfg["n_heads"],
        attn_implementation="sdpa",
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config).eval()
    model.lm_head.weight.copy_(book.out_head.weight)
    trunk = model.transformer
    trunk.wte.weight.copy_(book.tok_emb.weight)
    trunk.wpe.weight.copy_(book.pos_emb.weight)
    _copy_norm(trunk.ln_f, book.final_norm)
    for ours, block in zip(trunk.h, book.trf_blocks, strict=True):
        att, ff = block.att, block.ff.layers
        _copy_norm(ours.ln_1, block.norm1)
        _copy_norm(ours.ln_2, block.norm2)
        _copy_linear(ours.attn.c_attn, att.W_query, att.W_key, att.W_value)
        _copy_linear(ours.attn.c_proj, att.out_proj)
        _copy_linear(ours.mlp.c_fc, ff[0])
        _copy_linear(ours.mlp.c_proj, ff[2])
    return model


def _copy_norm(into: nn.Module, norm: nn.Module) -> None:
    into.weight.copy_(norm.scale)
    into.bias.copy_(norm.shift)


def _copy_linear(into: nn.Module, *parts: nn.Linear) -> None:
    """GPT-2 keeps its weights as [in, out], the three projections side by side."""
    into.weight.copy_(torch.cat([part.weight for part in parts]).T)
    biases = [torch.zeros(part.out_features) if part.bias is None else part.bias for part in parts]
    into.bias.copy_(torch.cat(biases))


def ctranslate2_generator(model: nn.Module) -> Any:
    """CTranslate2's float32 form of a Hugging Face GPT-2; its tokens are the ids as text."""
    import ctranslate2
    from ctranslate2.converters.converter import Converter
    from ctranslate2.converters.transformers import GPT2Loader

    last = str(model.config.vocab_size - 1)
    words = {str(i): i for i in range(model.config.vocab_size)}
    tokenizer = SimpleNamespace(
        get_vocab=lambda: words, bos_token=last, eos_token=last, unk_token=last
    )

    class InMemory(Converter):
        def _load(self):
            return GPT2Loader()(model, tokenizer)

    with TemporaryDirectory() as folder:
        path = Path(folder, "gpt2")
        InMemory().convert(str(path), quantization="float32")
        return ctranslate2.Generator(
            str(path),
            device="cpu",
            inter_threads=1,
            intra_threads=torch.get_num_threads(),
            compute_type="float32",
        )


def products(
    rows: int, cfg: dict[str, Any], head_rows: int, backward: bool = False
) -> Callable[[], None]:
    """Only the matrix products of a forward pass, or of a training step, into ready buffers."""
    wide = cfg["emb_dim"]

    def operands(m: int, k: int, n: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        x, weight, out = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)
        both = [(out, weight, torch.empty(m, k)), (out.T, x, torch.empty(n, k))]
        return [(x, weight.T, out), *(both if backward else [])]

    sizes = ((wide, 3 * wide), (wide, wide), (wide, 4 * wide), (4 * wide, wide))
    layer = [product for k, n in sizes for product in operands(rows, k, n)]
    head = operands(head_rows, wide, cfg["vocab_size"])

    def run() -> None:
        for one, other, out in [*layer * cfg["n_layers"], *head]:
            torch.mm(one, other, out=out)

    return run
