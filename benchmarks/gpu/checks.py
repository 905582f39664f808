"""Every kernel and the whole model against float64, with PyTorch's own error as the measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.measure import Bench
from benchmarks.gpu.operations import (
    OPERATIONS,
    RAGGED,
    REAL,
    TINY,
    Function,
    Scale,
    Tensors,
    build,
)
from fastgpt import generate_text_simple
from fastgpt.bench.errors import allowed_error, largest_error, leaves_of, outputs_and_gradients
from fastgpt.bench.rounds import synchronize
from fastgpt.bench.workloads import Models
from fastgpt.model.decode_graph import Decoder
from fastgpt.model.token_pass import parts_of
from fastgpt.triton.causal_attention import causal_attention, causal_attention_backward

Row = dict[str, Any]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def compare(ours: Tensors, theirs: Tensors, exact: Tensors) -> Row:
    """The worst result: its error, PyTorch's, and whether ours keeps the error rule.

    Errors are relative to the largest exact element.
    """
    worst: Row = {"ratio": -1.0}
    for i, (o, t, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        size = max(e.abs().max().item(), 1e-30)
        error, measure = largest_error(o, e), largest_error(t, e)
        ratio = error / max(allowed_error(measure, e, o.dtype), 1e-30)
        if not ratio <= worst["ratio"]:
            worst = {"result": i, "error": error / size, "torch_error": measure / size}
            worst["ratio"] = ratio
        if ratio != ratio:  # NaN is worst of all
            break
    return worst | {"ok": worst["ratio"] <= 1.0}


def _right(definition: Function, inputs: Tensors, upstream: Tensors) -> tuple[Tensors, Tensors]:
    """Outputs and gradients in float64, and in the inputs' own dtype."""
    exact = outputs_and_gradients(definition, leaves_of(inputs, torch.float64), upstream)
    return exact, outputs_and_gradients(definition, leaves_of(inputs), upstream)


def _operation(bench: Bench, name: str, scale: Scale, dtype: torch.dtype) -> Row:
    work = build(name, scale, dtype, bench.device)
    exact, theirs = _right(work.definition, work.inputs, work.upstream)
    with torch.no_grad():
        ours = tuple(t.clone() for t in work.forward())
        if work.backward is not None:
            ours += tuple(t.clone() for t in work.backward())
    synchronize(bench.device)
    return compare(ours, theirs[: len(ours)], exact[: len(ours)])


def operations(bench: Bench) -> Iterator[Row]:
    """One row for each operation, dtype and size."""
    scales = {"tiny": TINY} if bench.dry else {"ragged": RAGGED, "real": REAL}
    for name in OPERATIONS:
        for size, scale in scales.items():
            for dtype in DTYPES if size != "real" else (torch.bfloat16,):
                label = str(dtype).removeprefix("torch.")
                row = {"check": name, "dtype": label, "size": size}
                yield bench.attempt(row, partial(_operation, bench, name, scale, dtype))
    for dtype in DTYPES:
        row = {"check": "causal_attention, dropout", "dtype": str(dtype).removeprefix("torch.")}
        yield bench.attempt(row | {"size": "square"}, partial(_dropout, bench, dtype))


def _dropout(bench: Bench, dtype: torch.dtype) -> Row:
    """Attention with dropout. The result for the identity as v shows which weights are kept."""
    size, p, seed = 16 if bench.dry else 64, 0.2, 2**40 + 7
    torch.manual_seed(123)
    shape = (3, 2, size, size)
    q, k, v, dout = (torch.randn(shape, dtype=dtype, device=bench.device) for _ in range(4))

    def ours(v: Tensor) -> Tensors:
        out, dq, dk, dv = (torch.empty_like(t) for t in (q, q, k, v))
        lse = torch.empty(shape[:3], device=bench.device)
        causal_attention(q, k, v, 0.1, out, lse, p, seed)
        causal_attention_backward(dout, q, k, v, out, lse, 0.1, dq, dk, dv, p, seed)
        return out, dq, dk, dv

    eye = torch.eye(size, dtype=dtype, device=bench.device).expand(shape).contiguous()
    kept = ours(eye)[0] > 0
    seen = torch.ones(size, size, dtype=torch.bool, device=bench.device).tril()

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax((q @ k.mT * 0.1).masked_fill(~seen, -torch.inf), dim=-1)
        return (weights * (kept / (1 - p)).to(q.dtype)) @ v

    exact, theirs = _right(definition, (q, k, v), (dout,))
    row = compare(ours(v), theirs, exact)
    drawn = kept[..., seen].float()
    row["kept"] = drawn.mean().item()
    near = abs(row["kept"] - (1 - p)) < 5 * (p * (1 - p) / drawn.numel()) ** 0.5
    return row | {"ok": row["ok"] and near}


def _pair(cfg: dict[str, Any], bench: Bench) -> tuple[nn.Module, nn.Module]:
    """The book's model and ours with the same weights."""
    models = Models(cfg)
    return models.book.to(bench.device).train(), models.fused.to(bench.device).train()


def _logits_and_gradients(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensors:
    logits = model(ids)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    parameters = [p for p in model.parameters() if p.requires_grad]
    return logits.detach(), loss.detach(), *torch.autograd.grad(loss, parameters)


def _model(bench: Bench, cfg: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> Row:
    book, ours = _pair(cfg, bench)
    ids, targets = (torch.randint(cfg["vocab_size"], shape, device=bench.device) for _ in range(2))
    exact = _logits_and_gradients(book.double(), ids, targets)
    theirs = _logits_and_gradients(book.to(dtype), ids, targets)
    return compare(_logits_and_gradients(ours.to(dtype), ids, targets), theirs, exact)


def _same_bits(bench: Bench, cfg: dict[str, Any], shape: tuple[int, int]) -> Row:
    _, ours = _pair(cfg, bench)
    ids = torch.randint(cfg["vocab_size"], shape, device=bench.device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # else the vendor's attention may run
    try:
        first, second = (_logits_and_gradients(ours.bfloat16(), ids, ids) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    return {"ok": all(torch.equal(a, b) for a, b in zip(first, second, strict=True))}


def _greedy(bench: Bench, cfg: dict[str, Any]) -> Row:
    """Cached generation must give the tokens of a full pass. In float32, so that ties are rare."""
    book, ours = _pair(cfg, bench)
    prompt = torch.randint(cfg["vocab_size"], (2, 5), device=bench.device)
    context, new = cfg["context_length"], min(20, cfg["context_length"] - 5)
    got = generate_text_simple(ours.eval(), prompt, new, context)
    with torch.no_grad():
        logits = book.double().eval()(got[:, :-1])[:, 4:]
    short = logits.amax(-1) - logits.gather(-1, got[:, 5:, None])[..., 0]
    return {"error": short.max().item(), "ok": short.max().item() <= 1e-4}


def _rows(bench: Bench, cfg: dict[str, Any]) -> Row:
    """Prompts of different lengths, packed and then by one graph a step; one row stays empty. Each
    row's logits, with the book's own in float32 as the measure.
    """
    book, ours = _pair(cfg, bench)
    context, new = cfg["context_length"], min(20, cfg["context_length"] - 5)
    lengths = [1, context - new, 5, (context - new) // 2 + 1]
    texts = [torch.randint(cfg["vocab_size"], (n + new,)).tolist() for n in lengths]
    rows = [0, 1, 3, 4]
    parts = parts_of(ours.eval())
    assert parts is not None
    decoder = Decoder(parts, 5)
    prompts = [text[:n] for text, n in zip(texts, lengths, strict=True)]
    found = [decoder.prefill(prompts, rows)]
    for i in range(new):
        ids = torch.zeros(5, dtype=torch.int64)
        ids[rows] = torch.tensor([text[n + i] for text, n in zip(texts, lengths, strict=True)])
        found.append(decoder.step(ids.to(bench.device))[rows])

    def whole(model: nn.Module) -> Tensors:
        ids = [torch.tensor([text], device=bench.device) for text in texts]
        return tuple(model(text)[0, -new - 1 :] for text in ids)

    with torch.no_grad():
        theirs, exact = whole(book.eval()), whole(book.double())
    return compare(torch.stack(found, dim=1).unbind(), theirs, exact)


def _bad_ids(bench: Bench, cfg: dict[str, Any]) -> Row:
    """An id outside the vocabulary is an IndexError, at once or in the next training step, and the
    device works on after it.
    """
    _, ours = _pair(cfg, bench)
    bad = torch.full((1, 4), cfg["vocab_size"], device=bench.device)

    def step(ids: Tensor) -> None:
        ours.loss(ids, ids).backward()

    def two_steps() -> None:
        step(bad)
        step(bad - 1)

    for grads, work in ((False, lambda: ours(bad)), (True, two_steps)):
        try:
            with torch.set_grad_enabled(grads):
                work()
            return {"ok": False, "failed": f"no IndexError, with gradients: {grads}"}
        except IndexError:
            synchronize(bench.device)
    return {"ok": bool(ours(bad - 1).isfinite().all())}


def _no_waits(bench: Bench, cfg: dict[str, Any], shape: tuple[int, int]) -> Row:
    """A training step after the first waits for nothing that PyTorch knows to be waited for."""
    _, ours = _pair(cfg, bench)
    optimizer = torch.optim.AdamW(ours.parameters(), fused=True)
    ids = torch.randint(cfg["vocab_size"], shape, device=bench.device)

    def step() -> None:
        ours.loss(ids, ids).backward()
        nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    if bench.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if bench.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return {"ok": True}


def models(bench: Bench, cfg: dict[str, Any]) -> Iterator[Row]:
    """Rows for the whole model: forward and backward by dtype, repetition, generation, bad ids."""
    shape = (1, 8) if bench.dry else (2, min(300, cfg["context_length"]))
    pieces: list[tuple[str, str, Callable[[], Row]]] = [
        ("model", str(dtype).removeprefix("torch."), lambda d=dtype: _model(bench, cfg, shape, d))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    pieces += [
        ("model, same bits twice", "bfloat16", lambda: _same_bits(bench, cfg, shape)),
        ("model, no waits", "float32", lambda: _no_waits(bench, cfg, shape)),
        ("model, greedy tokens", "float32", lambda: _greedy(bench, cfg)),
        ("model, packed prompts and rows", "float32", lambda: _rows(bench, cfg)),
    ]
    for name, dtype, work in pieces:
        yield bench.attempt({"check": name, "dtype": dtype, "size": str(list(shape))}, work)


def bad_ids(bench: Bench, cfg: dict[str, Any]) -> Row:
    """The row for ids outside the vocabulary. It comes last: if they are not refused, nothing else
    runs on the device afterwards.
    """
    row = {"check": "model, bad ids", "dtype": "float32", "size": "[1, 4]"}
    return bench.attempt(row, partial(_bad_ids, bench, cfg))
