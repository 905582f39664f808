"""The book's model in llama.cpp, through its Python package."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.bench.torch_gpt import TorchGPT

try:
    import numpy as np
except ImportError:  # then the peer is not installed either
    np = None  # type: ignore[assignment]

TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


class LlamaCpp:
    """The model with the weights of its products in one of TYPES. In float32 its caches are too."""

    def __init__(self, book: Any, cfg: dict[str, Any], precision: str) -> None:
        import llama_cpp

        self.llama, self.precision, self.vocab_size = llama_cpp, precision, cfg["vocab_size"]
        llama_cpp.llama_log_set(_silent(), None)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.use_mmap = False  # the file goes
        with TemporaryDirectory() as folder:
            path = Path(folder, "gpt2.gguf")
            _write(path, TorchGPT(book, cfg), cfg, TYPES[precision])
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise RuntimeError("llama.cpp does not load the model")
        self.context: Any = None
        self.context_shape = (0, 0)

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.llama.llama_free(self.context)
        if getattr(self, "model", None):
            self.llama.llama_model_free(self.model)

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [B, T]. Returns the logits, [B, T, V], valid until the next call."""
        self._start(*ids.shape)
        return self._run(ids, 0, all_logits=True).view(*ids.shape, self.vocab_size)

    def generate(self, ids: Tensor, max_new_tokens: int) -> Tensor:
        """ids: [B, T]. Returns [B, T + max_new_tokens], which must fit the context."""
        B, past = len(ids), 0
        self._start(B, ids.shape[1] + max_new_tokens)
        unseen = ids
        for _ in range(max_new_tokens):
            logits = self._run(unseen, past, all_logits=False)
            past += unseen.shape[1]
            unseen = logits.argmax(dim=-1, keepdim=True)
            ids = torch.cat((ids, unseen), dim=1)
        return ids

    def _start(self, batch: int, tokens: int) -> None:
        """A context for so many sequences of so many tokens, with nothing in its caches."""
        llama, shape = self.llama, (batch, tokens)
        if self.context_shape != shape:
            if self.context:
                llama.llama_free(self.context)
            options = llama.llama_context_default_params()
            options.n_seq_max, options.n_ctx = batch, batch * -(-tokens // 256) * 256
            options.n_batch = options.n_ubatch = batch * tokens
            options.n_threads = options.n_threads_batch = torch.get_num_threads()
            if self.precision == "float32":
                options.type_k = options.type_v = llama.GGML_TYPE_F32
            self.context = llama.llama_init_from_model(self.model, options)
            self.context_shape = shape if self.context else (0, 0)
            if not self.context:
                raise RuntimeError("llama.cpp makes no context")
        llama.llama_memory_clear(llama.llama_get_memory(self.context), False)

    def _run(self, ids: Tensor, past: int, all_logits: bool) -> Tensor:
        """The logits of every token, or of the last of each row."""
        B, T = ids.shape
        batch = self.llama.llama_batch_init(B * T, 0, 1)
        batch.n_tokens = B * T
        for i, token in enumerate(ids.flatten().tolist()):
            batch.token[i], batch.pos[i] = token, past + i % T
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, i // T
            batch.logits[i] = all_logits or i % T == T - 1
        failed = self.llama.llama_decode(self.context, batch)
        self.llama.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        shape = (B * T if all_logits else B, self.vocab_size)
        return torch.from_numpy(
            np.ctypeslib.as_array(self.llama.llama_get_logits(self.context), shape)
        )


@cache
def _silent() -> Any:
    """What llama.cpp calls with its messages, kept for as long as it may."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def _write(path: Path, model: TorchGPT, cfg: dict[str, Any], kind: str) -> None:
    """The model as a GGUF file without a tokenizer."""
    import gguf

    file = gguf.GGUFWriter(path, "gpt2")
    file.add_vocab_size(cfg["vocab_size"])
    file.add_context_length(cfg["context_length"])
    file.add_embedding_length(cfg["emb_dim"])
    file.add_feed_forward_length(4 * cfg["emb_dim"])
    file.add_block_count(cfg["n_layers"])
    file.add_head_count(cfg["n_heads"])
    file.add_layer_norm_eps(model.norm.eps)
    file.add_tokenizer_model("no_vocab")
    file.add_tensor("token_embd.weight", model.tok_emb.weight.detach().numpy())
    file.add_tensor("position_embd.weight", model.pos_emb.weight.detach().numpy())
    narrow = gguf.GGMLQuantizationType[kind]
    for name, module in _layers(model):
        weight = module.weight.detach().numpy()
        if isinstance(module, nn.Linear):
            weight = gguf.quants.quantize(weight, narrow)
            file.add_tensor(f"{name}.weight", weight, raw_dtype=narrow)
        else:
            file.add_tensor(f"{name}.weight", weight)
        bias = module.bias
        if bias is None and name.endswith("attn_qkv"):
            bias = torch.zeros(len(module.weight))
        if bias is not None:
            file.add_tensor(f"{name}.bias", bias.detach().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def _layers(model: TorchGPT) -> Iterator[tuple[str, Any]]:
    """The norms and the linear layers by the names of the file."""
    for i, block in enumerate(model.blocks):
        yield f"blk.{i}.attn_norm", block.norm1
        yield f"blk.{i}.attn_qkv", block.qkv
        yield f"blk.{i}.attn_output", block.out_proj
        yield f"blk.{i}.ffn_norm", block.norm2
        yield f"blk.{i}.ffn_up", block.widen
        yield f"blk.{i}.ffn_down", block.narrow
    yield "output_norm", model.norm
    yield "output", model.out_head
