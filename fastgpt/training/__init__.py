"""Training: functions of chapters 5 and 7 under the book's names, and what `fastgpt train` runs."""

from fastgpt.training.book import (
    GPTDatasetV1,
    calc_loss_batch,
    calc_loss_loader,
    create_dataloader_v1,
    evaluate_model,
    format_input,
    generate_and_print_sample,
    text_to_token_ids,
    token_ids_to_text,
    train_model_simple,
)

__all__ = [
    "GPTDatasetV1",
    "calc_loss_batch",
    "calc_loss_loader",
    "create_dataloader_v1",
    "evaluate_model",
    "format_input",
    "generate_and_print_sample",
    "text_to_token_ids",
    "token_ids_to_text",
    "train_model_simple",
]
