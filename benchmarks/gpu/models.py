"""GPT-2 in training and generation: the book's model, its optimised forms, Hugging Face, ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.measure import Bench
from fastgpt import generate_text_simple, reference
from fastgpt.bench.bound import forward_flops
from fastgpt.bench.cached_book import CachedBook
from fastgpt.bench.workloads import Models
from fastgpt.model import decode_graph
from fastgpt.model.token_pass import parts_of

Row = dict[str, Any]
Loss = Callable[[Tensor, Tensor], Tensor]
Trained = tuple[nn.Module, Loss]
Decoder = Callable[[Tensor, int], Tensor]


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


def _training_peers(bench: Bench, cfg: dict[str, Any]) -> dict[str, Callable[[], Trained]]:
    """By name, what makes the model and its loss; the quick ones come first."""
    dropout = cfg | {"drop_rate": 0.1}

    def peer(name: str, cfg: dict[str, Any] = cfg, compiled: bool = False) -> Callable[[], Trained]:
        def build() -> Trained:
            model = getattr(Models(cfg), name)
            if name == "fused":
                return model, model.loss
            if name == "hf":
                return model, _loss(partial(model, use_cache=False))
            return model, _loss(_compiled(bench, model) if compiled else model)

        return build

    return {
        "fastgpt": peer("fused"),
        "optimised book": peer("torch"),
        "HF": peer("hf"),
        "book": peer("book"),
        "fastgpt, dropout 0.1": peer("fused", dropout),
        "optimised book, dropout 0.1": peer("torch", dropout),
        "optimised book, max-autotune": peer("torch", compiled=True),
        "book, max-autotune": peer("book", compiled=True),
    }


def _train(bench: Bench, cfg: dict[str, Any], build: Callable[[], Trained], batch: int) -> Row:
    """Time steps at that batch, or at the largest half, quarter and so on that fits."""
    tokens = cfg["context_length"]
    while True:
        try:
            return _steps(bench, build, cfg["vocab_size"], batch, tokens) | {"batch": batch}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2


def _steps(bench: Bench, build: Callable[[], Trained], vocab: int, batch: int, tokens: int) -> Row:
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
    """A row for each peer: tokens per second of a whole step of AdamW in bfloat16, the share of the
    peak, the memory.
    """
    batch = 2 if bench.dry else 64
    a_token = 3 * forward_flops(cfg, cfg["context_length"]) / cfg["context_length"]
    for name, build in _training_peers(bench, cfg).items():
        row = {"train": name, "tokens": cfg["context_length"]}
        row = bench.attempt(row, lambda b=build: _train(bench, cfg, b, batch))
        if "seconds" in row:
            rate = row["tokens_per_second"] * a_token
            row["share_of_product_rate"] = rate / bench.peaks["flops"]
            row["share_of_peak"] = rate / peak if peak else None
        torch._dynamo.reset()
        yield row


def _decoders(bench: Bench, cfg: dict[str, Any]) -> dict[str, Callable[[], Decoder]]:
    """By name, what makes a function from a prompt and a number to that many more tokens."""
    context = cfg["context_length"]

    def ready(name: str) -> Any:
        return getattr(Models(cfg), name).to(bench.device, torch.bfloat16)

    def looped(name: str) -> Decoder:
        model = ready(name)
        loop = generate_text_simple if name == "fused" else reference.generate_text_simple
        return lambda prompt, new: loop(model, prompt, new, context)

    def hugging_face(**options: Any) -> Decoder:
        model = ready("hf")
        return lambda prompt, new: model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **options,
        )

    def in_rows() -> Decoder:
        parts = parts_of(ready("fused").eval())
        assert parts is not None
        decoder_of = lru_cache(maxsize=1)(partial(decode_graph.Decoder, parts))

        def generate(prompt: Tensor, new: int) -> Tensor:
            """Behind the last 1, 2, 3 and so on tokens of the prompts."""
            rows, length = range(len(prompt)), prompt.shape[1]
            decoder = decoder_of(len(prompt))
            ends = [ids[-1 - row % length :] for row, ids in enumerate(prompt.tolist())]
            tokens = [decoder.prefill(ends, rows).argmax(-1)]
            for _ in range(new - 1):
                tokens.append(decoder.step(tokens[-1]).argmax(-1))
            return torch.cat((prompt, torch.stack(tokens, dim=1)), dim=1)

        return generate

    peers: dict[str, Callable[[], Decoder]] = {
        "fastgpt": partial(looped, "fused"),
        "fastgpt, prompts of different lengths": in_rows,
        "book's loop": partial(looped, "book"),
        "optimised book's loop": partial(looped, "torch"),
        "book with a cache": lambda: CachedBook(ready("book")).generate,
        "HF": hugging_face,
    }
    if not bench.dry:
        # transformers compiles its steps if the cache is static.
        peers["HF, static cache"] = partial(hugging_face, cache_implementation="static")
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
