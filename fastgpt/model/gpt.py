"""The book's GPTModel: the whole of it, its loss, its cache and its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgpt import dispatch, ops, weights
from fastgpt.config import (
    WINDOW,
    Config,
    as_ids,
    check_config,
    check_ids,
    check_whole_number,
    comparable,
    in_plain_ints,
)
from fastgpt.cpu.forward import Piece, WholePass
from fastgpt.cpu.records import BlockRecord, EmbeddingRecord, EndRecord, Norm
from fastgpt.model.cache import CacheTransaction, OwnCache, idle, tokens_seen
from fastgpt.model.description import described
from fastgpt.model.fusable import (
    Obstacle,
    drop_probability,
    dropout_obstacle,
    drops_nothing,
    fusable_class,
    is_unmodified,
    obstacle,
)
from fastgpt.model.modules import (
    Branch,
    Dropout,
    LayerNorm,
    TransformerBlock,
    add_norm,
    added,
    linear,
)
from fastgpt.model.quantization import (
    QuantizedEmbedding,
    linear_obstacle,
    linear_of,
    quantized_copy,
)
from fastgpt.ops.id_check import raise_wrong_ids

if TYPE_CHECKING:
    from typing_extensions import Self


class ModelRecord(NamedTuple):
    """A model that consists of nothing but what fused code knows."""

    embeddings: EmbeddingRecord
    blocks: list[BlockRecord]
    end: EndRecord


@fusable_class
class GPTModel(nn.Module):
    """GPT-2 as the book builds it.

    Args:
        cfg: a mapping with vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate and
            qkv_bias, and perhaps kv_window_size; other keys are ignored. ``GPT_CONFIG_124M`` is
            one.
        disable_causal_mask: every token sees all others, as in chapter 6's bonus: for classifiers.
            The state dict has no mask then, no cache can be used, and generation takes the book's
            loop.

    Raises:
        KeyError: a key is missing.
        ValueError: no model can have a value, such as an emb_dim not divisible by n_heads.
    """

    def __init__(self, cfg: Config, disable_causal_mask: bool = False) -> None:
        super().__init__()
        check_config(cfg)
        self.cfg = cfg = in_plain_ints(cfg)
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(
            *[TransformerBlock(cfg, disable_causal_mask) for _ in range(cfg["n_layers"])]
        )
        self.final_norm = LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

        self._own_cache: OwnCache | None = None
        self._kv_window_size: int | None = None
        if WINDOW in cfg:
            self.kv_window_size = cfg[WINDOW]

    @property
    def kv_window_size(self) -> int:
        """The most tokens that the model's own cache holds, and that a call with use_cache takes:
        the whole context, unless the config or an assignment says otherwise. Where the cache is
        full, its oldest tokens are dropped, and new ones see only those that it still holds.
        """
        return self.max_context() if self._kv_window_size is None else self._kv_window_size

    @kv_window_size.setter
    def kv_window_size(self, size: int) -> None:
        check_whole_number(WINDOW, size, 1)
        self._kv_window_size = int(size)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], cfg: Config | None = None, **options: Any
    ) -> Self:
        """A model in eval mode with the weights of a folder, a file or the Hugging Face hub.

        Reads safetensors and torch.save files, whole or in shards, under the names of the book (its
        faster variant and its checkpoints too), Hugging Face or OpenAI. Files are mapped and copied
        in small windows; a head that is tied in the file is tied here.

        Args:
            name_or_path: a path, or a repository of the hub such as "gpt2" or "gpt2-xl".
            cfg: sizes that the files do not tell, which for the book's model.pth is n_heads, unless
                it has one of GPT-2's sizes; drop_rate overrides theirs.
            options: dtype and device, by default those of a new module; quantize, a precision of
                ``fastgpt.quantize``, and group, which quantise each tensor as it is read; revision,
                cache_dir, token and local_files_only, for the hub.

        Raises:
            WeightsError: a file cannot be read, or tensors are missing, left over or misshapen; all
                of them are named.
            FileNotFoundError: there is no such file, and the hub cannot be reached.
            ImportError: safetensors or huggingface_hub is missing.
        """
        return weights.from_pretrained(cls, name_or_path, cfg, convert=quantized_copy, **options)

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes model.safetensors and config.json for Hugging Face's GPT2LMHeadModel, or for
        ``from_pretrained`` alone if the model is quantised; see
        ``fastgpt.weights.save_pretrained``.
        """
        sizes = described(self)
        if state_dict is None:
            state_dict = dict(self.named_parameters(remove_duplicate=False))
            if sizes.quantization is not None:
                state_dict |= self.named_buffers(remove_duplicate=False)
        weights.save_pretrained(sizes, state_dict, directory)

    def forward(self, in_idx: Tensor, use_cache: bool = False, cache: Any = None) -> Tensor:
        """Token ids [B, T] -> logits [B, T, vocab_size].

        With a cache the tokens stand behind those in it, and join them.

        Args:
            in_idx: [B, T] token ids, any integer dtype.
            use_cache: go on with the model's own cache, where no other is given; ``reset_kv_cache``
                empties it. It holds the last ``kv_window_size`` tokens.
            cache: a ``KVCache``, or an object with its get and update.

        Raises:
            TypeError: the ids are not integers.
            ValueError: they are not [B, T], or not the cache's batch, or the tokens, earlier ones
                included, are more than the context length; in_idx has more than ``kv_window_size``
                with use_cache; or there is a cache and no causal mask, or no layer. The cache is
                as it was.
            IndexError: an id is outside the vocabulary; of a training step on our GPU kernels the
                next step raises it, and the logits are NaN.
        """
        if cache is None and use_cache:
            if self._own_cache is None:
                self._own_cache = OwnCache(len(self.trf_blocks))
            cache = self._own_cache
        return self.forward_pass(in_idx, cache)

    def loss(
        self,
        idx: Tensor,
        targets: Tensor,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> Tensor:
        """The cross entropy of the model's predictions, without the block of logits that
        ``cross_entropy(model(idx).flatten(0, 1), targets.flatten())`` holds, where the head is a
        plain linear layer without a bias and its weight a plain tensor; with it otherwise.

        Args:
            idx: [B, T] token ids, any integer dtype.
            targets: [B, T], the ids that should follow, any integer dtype.
            ignore_index: targets of this value cost nothing and do not count.
            reduction: "mean" over the targets that count, "sum" or "none".

        Returns:
            A scalar, or [B, T] for "none"; float64 for logits in that, else float32.

        Raises:
            TypeError: the ids or the targets are not integers.
            ValueError: idx is not [B, T], targets have another shape, the tokens are more than the
                context length, or the reduction is none of these.
            IndexError: an id or a target is outside the vocabulary; of a training step on our GPU
                kernels the next step raises it, and the loss is NaN.
        """
        idx = self.checked(idx, 0)
        if not isinstance(targets, Tensor) or targets.shape != idx.shape:
            shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(f"targets {shape} must have the shape of the ids {tuple(idx.shape)}")
        targets = comparable(targets)
        head: Any = self.out_head
        rest = (ignore_index, reduction)
        if (
            is_unmodified(self, GPTModel)
            and is_unmodified(head, nn.Linear)
            and head._parameters.get("weight") is not None
            and head.bias is None
        ):
            ops.check_targets(targets, head.weight.shape[0], ignore_index)
            whole = self.whole_pass(idx, with_head=False)
            h = self._features(idx, 0, None, last_only=False) if whole is None else whole.run(idx)
            return ops.checked_linear_cross_entropy(h, head.weight, targets, *rest, owner=self)
        logits = self(idx)
        ops.check_targets(targets, logits.shape[-1], ignore_index)
        raise_wrong_ids(targets)  # PyTorch's loss would end the process's use of the GPU
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits, labels = logits.flatten(0, 1), targets.flatten().long()
        loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss

    def reset_kv_cache(self) -> None:
        """Empties the model's own cache, and gives back the memory that generation on a GPU keeps
        for the next: a CUDA graph, with keys and values for the whole context.
        """
        self._own_cache = None
        idle.pop(self, None)

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; training gets the memory that generation on a GPU had kept."""
        if mode:
            idle.pop(self, None)
        return super().train(mode)

    def forward_pass(
        self,
        in_idx: Tensor,
        cache: Any = None,
        last_only: bool = False,
        whole: WholePass | None = None,
    ) -> Tensor:
        """``forward`` for all tokens or the last alone, [B, T or 1, vocab_size].

        Args:
            whole: what ``whole_pass`` gave, if nothing has changed since; else the pieces are
                looked at again.
        """
        in_idx = self.checked(in_idx, tokens_seen(cache))
        staged, past, first = None, 0, 0
        if cache is not None:
            staged = self._staged(cache, in_idx)
            past, first = staged.past, staged.first
        if whole is None:
            whole = self.whole_pass(in_idx, first=first)
        if whole is None or in_idx.numel() == 0:
            logits = linear(self.out_head, self._features(in_idx, first + past, staged, last_only))
        else:
            logits = whole.run(in_idx, past, staged, last_only)
        if staged is not None:
            staged.commit()
        return logits

    def _staged(self, cache: Any, idx: Tensor) -> CacheTransaction:
        limit, (batch, tokens) = self.max_context(), idx.shape
        if len(self.trf_blocks) == 0 and not isinstance(cache, OwnCache):
            raise ValueError("a model of no layers has nothing to cache, not even its position")
        if isinstance(cache, OwnCache):
            limit = min(limit, self.kv_window_size)
            if tokens > limit:
                raise ValueError(
                    f"{tokens} tokens are more than the {WINDOW} of {limit}: feed them in pieces"
                )
        return CacheTransaction(cache, batch, tokens, limit)

    def whole_pass(self, idx: Tensor, with_head: bool = True, first: int = 0) -> WholePass | None:
        """The model as pieces of one call into C++, for ids such as these, behind a cache whose
        first token has this position; None if gradients are wanted, or nothing can run that way.
        Good while nothing changes the model.
        """
        if not dispatch.takes_whole_pass(idx) or idx.numel() == 0:
            return None
        if not is_unmodified(self.trf_blocks, nn.Sequential):
            return None
        blocks: Any = self.trf_blocks._modules.values()
        records = [b.record() if type(b) is TransformerBlock else None for b in blocks]
        whole = WholePass(
            self,
            self._embedding_piece(first),
            [Piece(record, block) for record, block in zip(records, blocks, strict=True)],
            Piece(self._end_record(with_head), self._with_head if with_head else self.final_norm),
            dispatch.autocasts(idx),
        )
        return whole if whole.fuses else None

    def record(self) -> ModelRecord | None:
        """What the model consists of; None if ``obstacles`` are in the way."""
        blocks: Any = self.trf_blocks
        if not is_unmodified(self, GPTModel) or not is_unmodified(blocks, nn.Sequential):
            return None
        records = [b.record() if type(b) is TransformerBlock else None for b in blocks]
        embeddings, end = self._embedding_record(), self._end_record()
        if embeddings is None or end is None or any(record is None for record in records):
            return None
        return ModelRecord(embeddings, records, end)  # type: ignore[arg-type]

    def obstacles(self) -> list[Obstacle]:
        """All that keeps pieces of the model from running fused."""
        found = [
            obstacle(self, GPTModel, ""),
            obstacle(self.tok_emb, _embedding_class(self.tok_emb), "tok_emb"),
            obstacle(self.pos_emb, nn.Embedding, "pos_emb"),
            obstacle(self.trf_blocks, nn.Sequential, "trf_blocks"),
            obstacle(self.final_norm, LayerNorm, "final_norm"),
            linear_obstacle(self.out_head, "out_head"),
        ]
        for name in ("tok_emb", "pos_emb"):
            if getattr(getattr(self, name), "max_norm", None) is not None:
                found.append(Obstacle(name, "a max_norm"))
        if drop_probability(self.drop_emb) is None:
            found.append(dropout_obstacle(self.drop_emb, "drop_emb"))
        for name, block in self.trf_blocks.named_children():
            path = f"trf_blocks.{name}"
            if isinstance(block, TransformerBlock):
                found += [one.below(path) for one in block.obstacles()]
            else:
                found.append(obstacle(block, TransformerBlock, path))
        return [one for one in found if one is not None]

    def _embedding_piece(self, first: int) -> Piece:
        record = self._embedding_record()
        if record is not None and first:
            record = record._replace(pos=record.pos[first:])
        return Piece(record, lambda ids, past: self._embedded_by_modules(ids, first + past))

    def _embedding_record(self) -> EmbeddingRecord | None:
        tables = (self.tok_emb, self.pos_emb)
        if not drops_nothing(self.drop_emb):
            return None
        tok, pos = map(_rows_of, tables)
        return None if tok is None or not isinstance(pos, Tensor) else EmbeddingRecord(tok, pos)

    def _end_record(self, with_head: bool = True) -> EndRecord | None:
        norm: Any = self.final_norm
        head: Any = self.out_head
        last = linear_of(head) if with_head else None
        if not is_unmodified(norm, LayerNorm) or (with_head and last is None):
            return None
        scale, shift = (norm._parameters.get(name) for name in ("scale", "shift"))
        return EndRecord(Norm(scale, shift), norm.eps, last)

    def _with_head(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out_head(self.final_norm(x))
        return logits

    def _features(
        self, in_idx: Tensor, position: int, cache: CacheTransaction | None, last_only: bool
    ) -> Tensor:
        """What the head gets, [B, T or 1, emb_dim], of tokens from this position on."""
        x = self._embedded(in_idx, position)
        branch: Branch | None = None
        if is_unmodified(self.trf_blocks, nn.Sequential) or cache is not None:
            for layer, block in enumerate(self.trf_blocks):
                if isinstance(block, TransformerBlock) and is_unmodified(block, TransformerBlock):
                    x, branch = block.forward_residual(x, branch, cache, layer, self)
                else:
                    x, branch = added(x, branch), None
                    x = block(x) if cache is None else block(x, cache, layer)
        else:
            x = self.trf_blocks(x)
        if last_only:  # behind the dropout, whose mask is that of all tokens
            x, branch = added(x, branch)[:, -1:], None
        return add_norm(x, branch, self.final_norm)[1]

    def _embedded(self, in_idx: Tensor, position: int) -> Tensor:
        dropout_p = drop_probability(self.drop_emb)
        if dropout_p is not None and not torch.compiler.is_compiling():
            tables = [_table(module) for module in (self.tok_emb, self.pos_emb)]
            if tables[0] is not None and tables[1] is not None:
                return ops.embedding(in_idx, tables[0], tables[1], position, dropout_p)
        return self._embedded_by_modules(in_idx, position)

    def _embedded_by_modules(self, in_idx: Tensor, position: int) -> Tensor:
        positions = torch.arange(position, position + in_idx.shape[1], device=in_idx.device)
        x: Tensor = self.drop_emb(self._token_embeddings(in_idx) + self.pos_emb(positions))
        return x

    def max_context(self) -> int:
        """The most tokens that there are positions for."""
        positions: nn.Module = self.pos_emb
        if isinstance(positions, nn.Embedding):
            return positions.weight.shape[0]
        return int(self.cfg["context_length"])

    def checked(self, idx: Tensor, past: int) -> Tensor:
        """The ids as int32 or int64, [B, T], behind `past` others; errors as ``forward``."""
        idx = as_ids(idx)
        tokens, context = past + idx.shape[1], self.max_context()
        if tokens > context:
            seen = f" ({past} of them seen before)" if past else ""
            raise ValueError(f"{tokens} tokens{seen} are more than the context length {context}")
        return idx

    def _token_embeddings(self, idx: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.tok_emb(idx)
        if idx.is_cuda and isinstance(self.tok_emb, nn.Embedding) and dispatch.readable(idx):
            # The look-up itself would end the process's use of the GPU.
            check_ids(idx, self.tok_emb.weight.shape[0])
        try:
            return self.tok_emb(idx)
        except IndexError:
            if isinstance(self.tok_emb, nn.Embedding):
                check_ids(idx, self.tok_emb.weight.shape[0])
            raise


def _table(module: Any) -> Tensor | None:
    """The weight of an embedding that does nothing but look up; None for any other."""
    looks_up = (
        is_unmodified(module, nn.Embedding)
        and module._parameters.get("weight") is not None
        and module.padding_idx is None
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )
    return module.weight if looks_up else None


def _embedding_class(module: Any) -> type[nn.Module]:
    return QuantizedEmbedding if type(module) is QuantizedEmbedding else nn.Embedding


def _rows_of(module: Any) -> Any:
    """The weight of an embedding whose output is its rows, quantised or not; None for any other."""
    if is_unmodified(module, QuantizedEmbedding):
        return module.quantized_weight
    if not is_unmodified(module, nn.Embedding) or module.max_norm is not None:
        return None
    return module._parameters.get("weight")
