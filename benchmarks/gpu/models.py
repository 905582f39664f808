"""GPT-2 in training and generation: the book's model, its optimised forms, Hugging Face, ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.measure import Bench
from benchmarks.gpu.optimised_book import OptimisedBook
from fastgpt import GPTModel, generate_text_simple, reference
from fastgpt.bench import libraries
from fastgpt.bench.cached_book import CachedBook

Row = dict[str, Any]
Loss = Callable[[Tensor, Tensor], Tensor]


def _book(cfg: dict[str, Any]) -> nn.Module:
    torch.manual_seed(123)
    return reference.GPTModel(cfg)


def _ours(cfg: dict[str, Any]) -> GPTModel:
    model = GPTModel(cfg)
    model.load_state_dict(_book(cfg).state_dict())
    return model


def _loss(model: Callable[[Tensor], Any]) -> Loss:
    """The mean cross entropy of a model's logits: the book's loss."""

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        logits = model(ids)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return loss


def _compiled(bench: Bench, model: nn.Module) -> Callable[[Tensor], Any]:
    if bench.dry:
        return torch.compile(model, backend="eager")
    return torch.compile(model, mode="max-autotune")


def _training_peers(bench: Bench, cfg: dict[str, Any]) -> dict[str, Callable[[], tuple]]:
    """By name, what makes the model and its loss; the quick ones come first."""
    dropout = cfg | {"drop_rate": 0.1}

    def of(model: nn.Module) -> tuple[nn.Module, Loss]:
        return model, _loss(model)

    def ours(cfg: dict[str, Any]) -> tuple[nn.Module, Loss]:
        model = _ours(cfg)
        return model, getattr(model, "loss", None) or _loss(model)

    def hugging_face() -> tuple[nn.Module, Loss]:
        if reason := libraries.missing("transformers"):
            raise ModuleNotFoundError(reason)
        model = libraries.hugging_face(_book(cfg), cfg)
        return model, _loss(partial(model, use_cache=False))

    def compiled(book: Callable[[dict[str, Any]], nn.Module]) -> tuple[nn.Module, Loss]:
        model = book(cfg)
        return model, _loss(_compiled(bench, model))

    return {
        "fastgpt": lambda: ours(cfg),
        "optimised book": lambda: of(OptimisedBook(_book(cfg), cfg)),
        "HF": hugging_face,
        "book": lambda: of(_book(cfg)),
        "fastgpt, dropout 0.1": lambda: ours(dropout),
        "optimised book, dropout 0.1": lambda: of(OptimisedBook(_book(dropout), dropout)),
        "optimised book, max-autotune": lambda: compiled(
            lambda cfg: OptimisedBook(_book(cfg), cfg)
        ),
        "book, max-autotune": lambda: compiled(_book),
    }


def operations_a_token(cfg: dict[str, Any], tokens: int) -> float:
    """Floating-point operations of training on one token, as nanoGPT counts them: six for each
    weight of a product, and attention as if nothing were masked.
    """
    wide, layers = cfg["emb_dim"], cfg["n_layers"]
    weights = layers * 12 * wide * wide + wide * cfg["vocab_size"]
    return 6 * weights + 12 * layers * wide * tokens


def _train(bench: Bench, cfg: dict[str, Any], build: Callable[[], tuple], batch: int) -> Row:
    """Times steps at that batch, or at the largest half, quarter and so on that fits."""
    tokens = cfg["context_length"]
    while True:
        try:
            return _steps(bench, build, cfg["vocab_size"], batch, tokens) | {"batch": batch}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2


def _steps(bench: Bench, build: Callable[[], tuple], vocab: int, batch: int, tokens: int) -> Row:
    model, loss_of = build()
    model.to(bench.device, torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=not bench.dry)
    torch.manual_seed(123)
    ids = torch.randint(vocab, (batch, tokens + 1), device=bench.device)
    losses = []

    def step() -> None:
        loss = loss_of(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    with bench.peak_memory() as peak:
        seconds = bench.seconds_of(step, calls=5)
        found = {"seconds": seconds, "gigabytes": peak()}
    first, last = losses[0].item(), losses[-1].item()
    return found | {"tokens_per_second": batch * tokens / seconds, "losses": [first, last]}


def training(bench: Bench, cfg: dict[str, Any], peak: float | None) -> Iterator[Row]:
    """A row for each peer: a whole step of AdamW in bfloat16, tokens a second, share, memory."""
    batch = 2 if bench.dry else 64
    a_token = operations_a_token(cfg, cfg["context_length"])
    for name, build in _training_peers(bench, cfg).items():
        row = {"train": name, "tokens": cfg["context_length"]}
        row = bench.attempt(row, lambda b=build: _train(bench, cfg, b, batch))
        if "seconds" in row:
            rate = row["tokens_per_second"] * a_token
            row["share_of_product_rate"] = rate / bench.rate
            row["share_of_peak"] = rate / peak if peak else None
        torch._dynamo.reset()
        yield row


def _decoders(bench: Bench, cfg: dict[str, Any]) -> dict[str, Callable[[], Callable]]:
    """By name, what makes a function from a prompt and a number to that many more tokens."""
    context = cfg["context_length"]

    def ready(model: nn.Module) -> nn.Module:
        return model.to(bench.device, torch.bfloat16).eval()

    def ours() -> Callable[[Tensor, int], Tensor]:
        model = ready(_ours(cfg))
        return lambda prompt, new: generate_text_simple(model, prompt, new, context)

    def looped(model: Callable[[dict[str, Any]], nn.Module]) -> Callable[[Tensor, int], Tensor]:
        plain = ready(model(cfg))
        return lambda prompt, new: reference.generate_text_simple(plain, prompt, new, context)

    def cached() -> Callable[[Tensor, int], Tensor]:
        return CachedBook(ready(_book(cfg))).generate

    def hugging_face(**options: Any) -> Callable[[Tensor, int], Tensor]:
        if reason := libraries.missing("transformers"):
            raise ModuleNotFoundError(reason)
        model = ready(libraries.hugging_face(_book(cfg), cfg))
        return lambda prompt, new: model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **options,
        )

    peers: dict[str, Callable[[], Callable]] = {
        "fastgpt": ours,
        "book's loop": lambda: looped(_book),
        "optimised book's loop": lambda: looped(lambda cfg: OptimisedBook(_book(cfg), cfg)),
        "book with a cache": cached,
        "HF": hugging_face,
    }
    if not bench.dry:
        # Its compiled steps; transformers compiles where the cache is static.
        peers["HF, static cache"] = lambda: hugging_face(cache_implementation="static")
    return peers


def decoding(bench: Bench, cfg: dict[str, Any]) -> Iterator[Row]:
    """A row for each peer and batch: greedy tokens a second behind a prompt."""
    prompt_tokens, new = (3, 4) if bench.dry else (32, 256)
    for name, make in _decoders(bench, cfg).items():
        build = cache(make)  # once for all batches
        for batch in (1, 2) if bench.dry else (1, 8, 64):
            row = {"decode": name, "batch": batch, "prompt": prompt_tokens, "new": new}

            def work(build: Callable = build, batch: int = batch) -> Row:
                generate = build()
                torch.manual_seed(123)
                prompt = torch.randint(1, cfg["vocab_size"], (batch, prompt_tokens))
                prompt = prompt.to(bench.device)
                with torch.no_grad():
                    got = generate(prompt, new)
                    seconds = bench.seconds_of(lambda: generate(prompt, new), calls=3)
                assert got.shape == (batch, prompt_tokens + new), tuple(got.shape)
                return {"seconds": seconds, "tokens_per_second": batch * new / seconds}

            yield bench.attempt(row, work)
