"""Chapter 5: pretrain on a text, print the losses, generate, save.

    python examples/pretrain.py book.txt

Only the imports differ from the book's code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from start import HERE, arguments, start_model

from fastgpt import generate
from fastgpt.tokenizer import gpt2_encoding
from fastgpt.training import (
    create_dataloader_v1,
    text_to_token_ids,
    token_ids_to_text,
    train_model_simple,
)

PROMPT = "Every morning the keeper"


def main(argv: list[str] | None = None) -> list[float]:
    """Trains; returns the training losses."""
    parser = arguments(__doc__.split("\n")[0], epochs=10, batch=2, lr=4e-4)
    parser.add_argument("text", nargs="?", type=Path, default=HERE / "story.txt")
    parser.add_argument("--save", type=Path, help="save the weights there, under the book's keys")
    args = parser.parse_args(argv)

    model = start_model(args)
    tokenizer = gpt2_encoding()
    text = args.text.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    window = min(args.context, len(tokenizer.encode(text[cut:])) - 1)
    options = {"batch_size": args.batch, "max_length": window, "stride": window}
    train_loader = create_dataloader_v1(text[:cut], **options)
    val_loader = create_dataloader_v1(text[cut:], shuffle=False, drop_last=False, **options)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    train_losses, _, _ = train_model_simple(
        model,
        train_loader,
        val_loader,
        optimizer,
        args.device,
        num_epochs=args.epochs,
        eval_freq=5,
        eval_iter=5,
        start_context=PROMPT,
        tokenizer=tokenizer,
    )

    model.eval()
    ids = generate(
        model,
        text_to_token_ids(PROMPT, tokenizer).to(args.device),
        max_new_tokens=25,
        context_size=model.cfg["context_length"],
        temperature=1.4,
        top_k=25,
    )
    print(token_ids_to_text(ids, tokenizer))
    if args.save:
        torch.save(model.state_dict(), args.save)
    return train_losses


if __name__ == "__main__":
    main()
