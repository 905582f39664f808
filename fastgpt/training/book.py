"""Chapter 5's functions, chapter 2's data loader and chapter 7's prompt, under the book's names.

They draw the same random numbers, print the same lines and return the same values as the book's.
The loss of an unmodified GPTModel comes from ``GPTModel.loss``, which never holds the logits of a
whole batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fastgpt.model.fusable import is_unmodified
from fastgpt.model.generation import generate_text_simple
from fastgpt.model.gpt import GPTModel
from fastgpt.tokenizer import END_OF_TEXT, decoded, gpt2_encoding
from fastgpt.training.data import to_device
from fastgpt.training.settings import check_trainable

Device = torch.device | str


class _Windows:
    """Windows of a text's tokens; each is copied out when it is accessed.

    Args:
        ids: [N] token ids.
        starts: index of each window's first token.
        length: tokens in a window.
    """

    def __init__(self, ids: Tensor, starts: range, length: int) -> None:
        self.ids, self.starts, self.length = ids, starts, length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        start = self.starts[index]
        return self.ids[start : start + self.length].clone()


class GPTDatasetV1(Dataset[tuple[Tensor, Tensor]]):
    """Windows of max_length tokens, each with the same window shifted by one token as its target.

    Args:
        txt: the text.
        tokenizer: tiktoken's "gpt2" encoding, or any object with its ``encode``.
        max_length: tokens in a window.
        stride: tokens from the start of one window to the start of the next.

    ``input_ids`` and ``target_ids`` take indices and slices, like lists of windows. The tokens are
    held once, and every window that is returned is a copy, so changing it changes nothing else.
    """

    def __init__(self, txt: str, tokenizer: Any, max_length: int, stride: int) -> None:
        self.tokenizer = tokenizer
        ids = torch.tensor(tokenizer.encode(txt, allowed_special={END_OF_TEXT}), dtype=torch.long)
        last = len(ids) - max_length
        self.input_ids = _Windows(ids, range(0, last, stride), max_length)
        self.target_ids = _Windows(ids, range(1, last + 1, stride), max_length)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, idx: int) -> tuple[Tensor, Tensor]:
        return self.input_ids[idx], self.target_ids[idx]


def create_dataloader_v1(
    txt: str,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of (inputs, targets), [batch_size, max_length] each, of txt in GPT-2's tokens.

    Raises:
        EncodingError: tiktoken's table is not available.
    """
    return DataLoader(
        GPTDatasetV1(txt, gpt2_encoding(), max_length, stride),
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
    )


def text_to_token_ids(text: str, tokenizer: Any) -> Tensor:
    """Text -> token ids [1, T]."""
    ids = tokenizer.encode(text, allowed_special={END_OF_TEXT})
    return torch.tensor(ids, dtype=torch.long)[None]


def token_ids_to_text(token_ids: Tensor, tokenizer: Any) -> str:
    """Token ids [1, T] or [T] -> text, with U+FFFD for ids unknown to a tiktoken encoding."""
    ids = token_ids.reshape(-1).tolist() if len(token_ids) == 1 else token_ids.tolist()
    try:
        text: str = tokenizer.decode(ids)
    except KeyError:  # a padded vocabulary has more ids than the encoding
        if not hasattr(tokenizer, "decode_single_token_bytes"):
            raise
        return decoded(tokenizer, ids)
    return text


def format_input(entry: Mapping[str, Any]) -> str:
    """Chapter 7's prompt for an entry with an instruction and, if it has one, an input."""
    text = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{entry['instruction']}"
    )
    return text + (f"\n\n### Input:\n{entry['input']}" if entry.get("input") else "")


def calc_loss_batch(
    input_batch: Tensor, target_batch: Tensor, model: nn.Module, device: Device
) -> Tensor:
    """Mean cross-entropy of a batch [B, T] and its targets [B, T], with its gradient graph."""
    inputs, targets = to_device(input_batch, device), to_device(target_batch, device)
    if isinstance(model, GPTModel) and is_unmodified(model, GPTModel):
        return model.loss(inputs, targets)
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def calc_loss_loader(
    data_loader: DataLoader[Any],
    model: nn.Module,
    device: Device,
    num_batches: int | None = None,
) -> float:
    """Mean loss of the loader's first num_batches batches (None: all); NaN if it has no batch."""
    available = len(data_loader)
    if available == 0:
        return float("nan")
    wanted = available if num_batches is None else min(num_batches, available)
    batches = itertools.islice(data_loader, wanted)
    losses: list[float] = [calc_loss_batch(x, y, model, device).item() for x, y in batches]
    return sum(losses) / wanted


def evaluate_model(
    model: nn.Module,
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any],
    device: Device,
    eval_iter: int,
) -> tuple[float, float]:
    """Training and validation loss over eval_iter batches each; leaves the model in train mode."""
    model.eval()
    with torch.no_grad():
        losses = [
            calc_loss_loader(loader, model, device, num_batches=eval_iter)
            for loader in (train_loader, val_loader)
        ]
    model.train()
    return losses[0], losses[1]


def generate_and_print_sample(
    model: nn.Module, tokenizer: Any, device: Device, start_context: str
) -> None:
    """Prints start_context and 50 greedy tokens on one line; leaves the model in train mode.

    An empty start_context starts a new text, after <|endoftext|>.
    """
    model.eval()
    positions: Any = model.pos_emb
    start = text_to_token_ids(start_context or END_OF_TEXT, tokenizer).to(device)
    ids = generate_text_simple(model, start, 50, len(positions.weight))
    print(token_ids_to_text(ids, tokenizer).replace("\n", " "))
    model.train()


def train_model_simple(
    model: nn.Module,
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any],
    optimizer: torch.optim.Optimizer,
    device: Device,
    num_epochs: int,
    eval_freq: int,
    eval_iter: int,
    start_context: str,
    tokenizer: Any,
) -> tuple[list[float], list[float], list[int]]:
    """The book's training loop.

    Args:
        eval_freq: steps between evaluations; the first is after the first step.
        eval_iter: batches of each loader in an evaluation.
        start_context: the beginning of the sample that is printed after each epoch.

    Returns:
        Training losses, validation losses and tokens seen, one of each per evaluation.

    Raises:
        ValueError: no parameter requires a gradient, as in a quantised model without LoRA.
    """
    check_trainable(model)
    train_losses: list[float] = []
    val_losses: list[float] = []
    tokens_at: list[int] = []
    tokens_seen, step = 0, 0
    for epoch in range(num_epochs):
        model.train()
        for inputs, targets in train_loader:
            optimizer.zero_grad()
            calc_loss_batch(inputs, targets, model, device).backward()
            optimizer.step()
            tokens_seen += inputs.numel()
            if step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(
                    model, train_loader, val_loader, device, eval_iter
                )
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                tokens_at.append(tokens_seen)
                print(
                    f"Ep {epoch + 1} (Step {step:06d}): "
                    f"Train loss {train_loss:.3f}, Val loss {val_loss:.3f}"
                )
            step += 1
        generate_and_print_sample(model, tokenizer, device, start_context)
    return train_losses, val_losses, tokens_at
