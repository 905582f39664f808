"""Chapter 7: fine-tune on instructions, with padding excluded from the loss by targets of -100.

    python examples/instruct.py --model run --responses instruction-data-with-response.json

`train_model_simple` takes the loss from `model.loss`, which ignores targets of -100 as the book's
cross entropy does, and never holds the logits of the batch. `generate_batch` answers the whole test
set at once.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from start import HERE, arguments, start_model
from torch import Tensor
from torch.utils.data import DataLoader

from fastgpt import GPTModel, generate_batch
from fastgpt.tokenizer import gpt2_encoding
from fastgpt.training import format_input, train_model_simple

PAD, IGNORED = 50256, -100

Entry = dict[str, str]


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


def answer(model: GPTModel, entries: list[Entry]) -> None:
    """Gives each entry a "model_response", as the book does, but for all at once."""
    tokenizer = gpt2_encoding()
    prompts = [tokenizer.encode(format_input(entry)) for entry in entries]
    texts = generate_batch(model.eval(), prompts, max_new_tokens=256, eos_id=PAD)
    for entry, prompt, text in zip(entries, prompts, texts, strict=True):
        answered = tokenizer.decode(text[len(prompt) :])
        entry["model_response"] = answered.replace("### Response:", "").strip()


def main(argv: list[str] | None = None) -> list[float]:
    """Trains; returns the training losses."""
    parser = arguments(__doc__.split("\n")[0], epochs=2, batch=8, lr=5e-5)
    parser.add_argument("--instructions", type=Path, default=HERE / "instructions.json")
    parser.add_argument("--responses", type=Path, help="write the test set's answers there")
    args = parser.parse_args(argv)

    model = start_model(args, drop_rate=0.0, qkv_bias=True)
    context = model.cfg["context_length"]
    tokenizer = gpt2_encoding()
    entries: list[Entry] = json.loads(args.instructions.read_text(encoding="utf-8"))
    tested, trained = int(len(entries) * 0.1), int(len(entries) * 0.85)
    train, test = entries[:trained], entries[trained : trained + tested]
    val = entries[trained + tested :]

    def loader(entries: list[Entry], shuffle: bool) -> DataLoader:
        ids = [tokenizer.encode(format_input(entry) + response(entry)) for entry in entries]
        return DataLoader(ids, args.batch, shuffle, collate_fn=partial(collate, context=context))

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    train_losses, _, _ = train_model_simple(
        model,
        loader(train, shuffle=True),
        loader(val, shuffle=False),
        optimizer,
        args.device,
        num_epochs=args.epochs,
        eval_freq=5,
        eval_iter=5,
        start_context=format_input(val[0]),
        tokenizer=tokenizer,
    )

    answer(model, test)
    for entry in test[:3]:
        print(f"{format_input(entry)}\n")
        print(f"expected: {entry['output']}\nanswered: {entry['model_response']}\n")
    if args.responses:
        args.responses.write_text(json.dumps(test, indent=4), encoding="utf-8")
    return train_losses


if __name__ == "__main__":
    main()
