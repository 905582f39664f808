"""Chapter 7: fine-tune on instructions, with padding excluded from the loss by targets of -100.

    python examples/instruct.py --model run

`train_model_simple` takes the loss from `model.loss`, which ignores targets of -100 as the book's
cross entropy does, and never holds the logits of the batch.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from start import HERE, arguments, start_model
from torch import Tensor
from torch.utils.data import DataLoader

from fastgpt import generate
from fastgpt.tokenizer import gpt2_encoding
from fastgpt.training import text_to_token_ids, token_ids_to_text, train_model_simple

PAD, IGNORED = 50256, -100

Entry = dict[str, str]


def format_input(entry: Entry) -> str:
    """The book's prompt."""
    text = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{entry['instruction']}"
    )
    return text + (f"\n\n### Input:\n{entry['input']}" if entry["input"] else "")


def response(entry: Entry) -> str:
    return f"\n\n### Response:\n{entry['output']}"


def collate(batch: list[list[int]], context: int) -> tuple[Tensor, Tensor]:
    """Token ids of different lengths -> inputs and targets [B, T].

    Of a row's padding, only the first token counts in the targets: it ends the text.
    """
    longest = max(map(len, batch))
    inputs, targets = [], []
    for ids in batch:
        padded = ids + [PAD] * (longest + 1 - len(ids))
        hidden = [IGNORED] * (longest - len(ids))
        inputs.append(padded[:-1][:context])
        targets.append([*ids[1:], PAD, *hidden][:context])
    return torch.tensor(inputs), torch.tensor(targets)


def main(argv: list[str] | None = None) -> list[float]:
    """Trains; returns the training losses."""
    parser = arguments(__doc__.split("\n")[0], epochs=2, batch=8, lr=5e-5)
    parser.add_argument("--instructions", type=Path, default=HERE / "instructions.json")
    args = parser.parse_args(argv)

    model = start_model(args, drop_rate=0.0, qkv_bias=True)
    context = model.cfg["context_length"]
    tokenizer = gpt2_encoding()
    entries: list[Entry] = json.loads(args.instructions.read_text(encoding="utf-8"))
    kept = max(1, len(entries) // 10)  # for validation
    ids = [tokenizer.encode(format_input(entry) + response(entry)) for entry in entries]
    options = {"batch_size": args.batch, "collate_fn": partial(collate, context=context)}
    train_loader = DataLoader(ids[:-kept], shuffle=True, **options)
    val_loader = DataLoader(ids[-kept:], **options)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    prompt = format_input(entries[-1])
    train_losses, _, _ = train_model_simple(
        model,
        train_loader,
        val_loader,
        optimizer,
        args.device,
        num_epochs=args.epochs,
        eval_freq=5,
        eval_iter=5,
        start_context=prompt,
        tokenizer=tokenizer,
    )

    model.eval()
    asked = text_to_token_ids(prompt, tokenizer).to(args.device)
    answer = generate(model, asked, 35, context, eos_id=PAD)[:, asked.shape[1] :]
    print(token_ids_to_text(answer[0], tokenizer).replace("### Response:", "").strip())
    return train_losses


if __name__ == "__main__":
    main()
