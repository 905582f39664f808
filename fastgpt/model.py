"""The book's GPTModel: the whole of it, its loss, its cache and its checkpoints.

What runs as one call is in ``stack``; here is the way by modules, which fuses from piece to piece.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgpt import dispatch, ops
from fastgpt.config import Config, as_ids, check_config, check_ids, comparable, in_plain_ints
from fastgpt.kv_cache import KVCache, Staged, cached_tokens, idle
from fastgpt.modules import Dropout, LayerNorm, TransformerBlock, add_norm, linear
from fastgpt.plain import drop_probability, known, plain

if TYPE_CHECKING:
    from typing_extensions import Self


@known
class GPTModel(nn.Module):
    """GPT-2 as the book builds it.

    Args:
        cfg: a mapping with vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate and
            qkv_bias;
            other keys are ignored. ``GPT_CONFIG_124M`` is one.

    Raises:
        KeyError: a key is missing.
        ValueError: emb_dim is not divisible by n_heads.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        check_config(cfg)
        self.cfg = cfg = in_plain_ints(cfg)
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

        self._own_cache: KVCache | None = None

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
            options: dtype and device, by default those of a new module; revision, cache_dir, token
                and local_files_only, for the hub.

        Raises:
            WeightsError: a file cannot be read, or tensors are missing, left over or misshapen; all
                of them are named.
            FileNotFoundError: there is no such file, and the hub cannot be reached.
            ImportError: safetensors or huggingface_hub is missing.
        """
        from fastgpt import weights

        return weights.from_pretrained(cls, name_or_path, cfg, **options)

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes model.safetensors and config.json for Hugging Face's GPT2LMHeadModel; see
        ``fastgpt.weights.save_pretrained``.
        """
        from fastgpt import weights

        weights.save_pretrained(self, directory, state_dict)

    def forward(self, in_idx: Tensor, use_cache: bool = False, cache: Any = None) -> Tensor:
        """Token ids [B, T] -> logits [B, T, vocab_size].

        With a cache the tokens stand behind those in it, and join them.

        Args:
            in_idx: [B, T] token ids, any integer dtype.
            use_cache: go on with the model's own cache, where no other is given; ``reset_kv_cache``
                empties it.
            cache: a ``KVCache``, or an object with its get and update.

        Raises:
            TypeError: the ids are not integers.
            ValueError: they are not [B, T], or not the cache's batch, or the tokens, cached ones
                included, are more than the context length. The cache is as it was.
            IndexError: an id is outside the vocabulary.
        """
        if cache is None and use_cache:
            if self._own_cache is None:
                self._own_cache = KVCache(len(self.trf_blocks))
            cache = self._own_cache
        return self._forward(in_idx, cache)

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
            A scalar, or [B, T] for "none".

        Raises:
            TypeError: the ids or the targets are not integers.
            ValueError: idx is not [B, T], targets have another shape, the tokens are more than the
                context length, or the reduction is none of these.
            IndexError: an id or a target is outside the vocabulary.
        """
        idx = self._checked(idx, 0)
        if not isinstance(targets, Tensor) or targets.shape != idx.shape:
            shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(f"targets {shape} must have the shape of the ids {tuple(idx.shape)}")
        targets = comparable(targets)
        head: Any = self.out_head
        rest = (ignore_index, reduction)
        if (
            plain(self, GPTModel)
            and plain(head, nn.Linear)
            and head._parameters.get("weight") is not None
            and head.bias is None
        ):
            from fastgpt import stack  # which knows the classes above

            ops.check_targets(targets, head.weight.shape[0], ignore_index)
            h = stack.features(self, idx)
            if h is None:
                h = self._features(idx, 0, None, last_only=False)
            return ops.checked_linear_cross_entropy(h, head.weight, targets, *rest, owner=self)
        logits = self(idx)
        ops.check_targets(targets, logits.shape[-1], ignore_index)
        logits, labels = logits.flatten(0, 1), targets.flatten().long()
        loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss

    def reset_kv_cache(self) -> None:
        """Empties the model's own cache, and gives back the memory that generation on a GPU keeps
        for the next: a CUDA graph, with keys and values for the whole context.
        """
        self._own_cache = None
        idle.pop(self, None)

    def _forward(
        self, in_idx: Tensor, cache: Any = None, last_only: bool = False, memo: Any = None
    ) -> Tensor:
        from fastgpt import stack  # which knows the classes above

        past = cached_tokens(cache, 0)
        in_idx = self._checked(in_idx, past)
        staged = None if cache is None else Staged(cache, in_idx.shape[0], past)
        logits = stack.forward(self, in_idx, past, staged, last_only, memo)
        if logits is None:
            logits = self._by_modules(in_idx, past, staged, last_only)
        if staged is not None:
            staged.commit()
        return logits

    def _by_modules(
        self, in_idx: Tensor, past: int, cache: Staged | None, last_only: bool
    ) -> Tensor:
        return linear(self.out_head, self._features(in_idx, past, cache, last_only))

    def _features(self, in_idx: Tensor, past: int, cache: Staged | None, last_only: bool) -> Tensor:
        """What the head gets, [B, T or 1, emb_dim]."""
        x = self._embedded(in_idx, past)
        branch: Tensor | None = None
        if plain(self.trf_blocks, nn.Sequential) or cache is not None:
            for layer, block in enumerate(self.trf_blocks):
                if isinstance(block, TransformerBlock) and plain(block, TransformerBlock):
                    x, branch = block.advance(x, branch, cache, layer, self)
                else:
                    x = x if branch is None else branch + x
                    x, branch = block(x) if cache is None else block(x, cache, layer), None
        else:
            x = self.trf_blocks(x)
        if last_only:
            x, branch = x[:, -1:], None if branch is None else branch[:, -1:]
        return add_norm(x, branch, self.final_norm)[1]

    def _embedded(self, in_idx: Tensor, past: int) -> Tensor:
        dropout_p = drop_probability(self.drop_emb)
        if dropout_p is not None and not torch.compiler.is_compiling():
            tables = [_table(module) for module in (self.tok_emb, self.pos_emb)]
            if tables[0] is not None and tables[1] is not None:
                return ops.embedding(in_idx, tables[0], tables[1], past, dropout_p)
        positions = torch.arange(past, past + in_idx.shape[1], device=in_idx.device)
        return self.drop_emb(self._token_embeddings(in_idx) + self.pos_emb(positions))

    def _context(self) -> int:
        positions: nn.Module = self.pos_emb
        if isinstance(positions, nn.Embedding):
            return positions.weight.shape[0]
        return int(self.cfg["context_length"])

    def _checked(self, idx: Tensor, past: int) -> Tensor:
        idx = as_ids(idx)
        tokens, context = past + idx.shape[1], self._context()
        if tokens > context:
            cached = f" ({past} of them cached)" if past else ""
            raise ValueError(f"{tokens} tokens{cached} are more than the context length {context}")
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
        plain(module, nn.Embedding)
        and module._parameters.get("weight") is not None
        and module.padding_idx is None
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )
    return module.weight if looks_up else None
