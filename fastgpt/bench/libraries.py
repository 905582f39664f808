"""The book's GPT-2 in other libraries, with the same weights, and its matrix products alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def hugging_face(book: Any, cfg: dict[str, Any]) -> Any:
    """transformers' GPT2LMHeadModel in eval mode, with a copy of the book's weights, or with
    weights of its own if book is None.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=cfg["vocab_size"],
        n_positions=cfg["context_length"],
        n_embd=cfg["emb_dim"],
        n_layer=cfg["n_layers"],
        n_head=cfg["n_heads"],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), cfg["drop_rate"]),
        attn_implementation="sdpa",
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    if book is None:
        return model
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


def _copy_norm(into: Any, norm: Any) -> None:
    into.weight.copy_(norm.scale)
    into.bias.copy_(norm.shift)


def _copy_linear(into: Any, *parts: Any) -> None:
    """GPT-2 stores its weights as [in, out], the three projections side by side."""
    into.weight.copy_(torch.cat([part.weight for part in parts]).T)
    biases = [torch.zeros(part.out_features) if part.bias is None else part.bias for part in parts]
    into.bias.copy_(torch.cat(biases))


def ctranslate2_generator(model: Any) -> Any:
    """A Hugging Face GPT-2 in CTranslate2, in float32; its tokens are the ids as text."""
    import ctranslate2
    from ctranslate2.converters.converter import Converter
    from ctranslate2.converters.transformers import GPT2Loader

    last = str(model.config.vocab_size - 1)
    words = {str(i): i for i in range(model.config.vocab_size)}
    tokenizer = SimpleNamespace(
        get_vocab=lambda: words, bos_token=last, eos_token=last, unk_token=last
    )

    class InMemory(Converter):
        def _load(self) -> Any:
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


def hugging_face_text(model: Any, prompt: Tensor, new: int, **options: Any) -> Tensor:
    """A prompt, [B, T], continued greedily: [B, T + new]."""
    ids: Tensor = model.generate(
        prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )
    return ids


def ctranslate2_text(generator: Any, prompt: Tensor, new: int) -> Tensor:
    """The same by `ctranslate2_generator`."""
    words = [list(map(str, row)) for row in prompt.tolist()]
    results = generator.generate_batch(
        words, max_length=new, min_length=new, beam_size=1, include_prompt_in_result=False
    )
    return torch.cat((prompt, torch.tensor([r.sequences_ids[0] for r in results])), dim=1)


def products(
    rows: int, cfg: dict[str, Any], head_rows: int, backward: bool = False
) -> Callable[[], None]:
    """Only the matrix products of a forward pass, and of its backward pass if asked, into ready
    buffers. Every layer has its own weights, as in a model.
    """
    wide = cfg["emb_dim"]

    def operands(m: int, k: int, n: int, layers: int) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
        x, y, weights = torch.randn(m, k), torch.empty(m, n), torch.randn(layers, n, k)
        made = [[(x, weight.T, y)] for weight in weights]
        if backward:
            dy, dx, dweight = torch.randn(m, n), torch.empty(m, k), torch.empty(n, k)
            for layer, weight in zip(made, weights, strict=True):
                layer += [(dy, weight, dx), (dy.T, x, dweight)]
        return made

    sizes = ((wide, 3 * wide), (wide, wide), (wide, 4 * wide), (4 * wide, wide))
    kinds = [operands(rows, k, n, cfg["n_layers"]) for k, n in sizes]
    layers = [part for layer in zip(*kinds, strict=True) for made in layer for part in made]
    (head,) = operands(head_rows, wide, cfg["vocab_size"], 1)

    def run() -> None:
        for a, b, out in layers + head:
            torch.mm(a, b, out=out)

    return run
