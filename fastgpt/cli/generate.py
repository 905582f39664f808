"""`fastgpt generate`: streams text from a model, or completes a file of prompts in batches."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastgpt.cli.quantize import add_precision
from fastgpt.cli.usage import Commands, UsageError, add_device, number, positive, seed, text
from fastgpt.model.generation import generate_stream
from fastgpt.tokenizer import END_OF_TEXT, EncodingError, TextStream, gpt2_encoding
from fastgpt.training.settings import SettingsError, check_token, load_model, pick_device

if TYPE_CHECKING:
    import tiktoken

DTYPES = ("float32", "bfloat16", "float16")
# Token ids of prompts of equal length -> each step's new tokens, one per prompt.
Steps = Callable[[Sequence[list[int]]], Iterator[list[int]]]


def add_to(commands: Commands) -> None:
    sub = commands.add_parser(
        "generate",
        help="generate text with a model",
        description="Print PROMPT and the model's continuation as it is generated. With --prompts, "
        "print one JSON object per line instead, in the order of the file.",
    )
    sub.add_argument("prompt", nargs="?", type=text, metavar="PROMPT")
    sub.add_argument(
        "--model", required=True, metavar="MODEL", help="gpt2, or a folder or file of weights"
    )
    sub.add_argument("--prompts", type=Path, metavar="FILE", help="a file with one prompt per line")
    sub.add_argument("--batch", type=positive, default=8, metavar="N", help="prompts at once (8)")
    sub.add_argument("--max-new-tokens", type=positive, default=100, metavar="N", help="(100)")
    sub.add_argument(
        "--temperature", type=number(0), default=0.0, metavar="T", help="0: the likeliest token (0)"
    )
    sub.add_argument("--top-k", type=positive, metavar="N", help="sample from the N likeliest")
    sub.add_argument(
        "--top-p", type=_share, metavar="P", help="sample from the likeliest, up to probability P"
    )
    sub.add_argument("--seed", type=seed, default=123, metavar="N", help="(%(default)s)")
    sub.add_argument(
        "--stop",
        action="append",
        type=text,
        default=[],
        metavar="TEXT",
        help="stop before this text; repeatable",
    )
    add_precision(sub, "--quantize", None)
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    add_device(sub)
    sub.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    if (args.prompt is None) == (args.prompts is None):
        raise UsageError("give either a prompt or --prompts FILE")
    if args.temperature == 0 and (args.top_k or args.top_p):
        raise UsageError("--top-k and --top-p need a --temperature above 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    prompts = [args.prompt] if args.prompts is None else _read(args.prompts)
    try:
        options = {"quantize": args.quantize, "dtype": getattr(torch, args.dtype)}
        model = load_model(args.model, **options).eval().to(pick_device(args.device))
        encoding = gpt2_encoding()
        # An empty prompt starts a new text.
        ids = [encoding.encode(p or END_OF_TEXT, allowed_special={END_OF_TEXT}) for p in prompts]
        check_token("a prompt", max(map(max, ids)), model.cfg)
    except (SettingsError, EncodingError) as error:
        raise UsageError(error) from None

    def steps(batch: Sequence[list[int]]) -> Iterator[list[int]]:
        stream = generate_stream(
            model,
            torch.tensor(batch, device=model.pos_emb.weight.device),
            args.max_new_tokens,
            model.cfg["context_length"],
            args.temperature,
            args.top_k,
            eos_id=encoding.eot_token,
            top_p=args.top_p,
        )
        return (step[:, 0].tolist() for step in stream)

    torch.manual_seed(args.seed)
    start = time.perf_counter()
    if args.prompts is None:
        tokens = _stream(steps, encoding, args.prompt, ids[0], args.stop)
    else:
        tokens = _batches(steps, encoding, prompts, ids, args)
    seconds = time.perf_counter() - start
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def _stream(
    steps: Steps, encoding: tiktoken.Encoding, prompt: str, ids: list[int], stops: Sequence[str]
) -> int:
    """Prints the text as it is generated; returns the number of tokens."""
    print(prompt, end="", flush=True)
    stream, tokens = TextStream(encoding, stops), 0
    for (token,) in steps([ids]):
        tokens += 1
        print(stream.add(token), end="", flush=True)
        if stream.stopped:
            break
    print(stream.end(), flush=True)
    return tokens


def _batches(
    steps: Steps,
    encoding: tiktoken.Encoding,
    prompts: Sequence[str],
    ids: Sequence[list[int]],
    args: argparse.Namespace,
) -> int:
    """Prints a line for each prompt; returns the number of tokens, up to each prompt's end.

    Only prompts of equal length are batched, because the model has no padding.
    """
    done: dict[int, str] = {}
    tokens = 0
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for _, alike in itertools.groupby(order, key=lambda i: len(ids[i])):
        numbers = list(alike)
        for first in range(0, len(numbers), args.batch):
            batch = numbers[first : first + args.batch]
            texts, new = _complete(steps, encoding, [ids[i] for i in batch], args.stop)
            done.update(zip(batch, texts, strict=True))
            tokens += new
    for i, prompt in enumerate(prompts):
        print(json.dumps({"prompt": prompt, "text": done[i]}, ensure_ascii=False))
    return tokens


def _complete(
    steps: Steps, encoding: tiktoken.Encoding, ids: Sequence[list[int]], stops: Sequence[str]
) -> tuple[list[str], int]:
    """The continuation of each prompt, and the number of tokens in all of them."""
    streams = [TextStream(encoding, stops) for _ in ids]
    texts, ended, tokens = [""] * len(ids), [False] * len(ids), 0
    for step in steps(ids):
        for row, token in enumerate(step):
            ended[row] = ended[row] or streams[row].stopped or token == encoding.eot_token
            if not ended[row]:
                tokens += 1
                texts[row] += streams[row].add(token)
        if all(over or stream.stopped for over, stream in zip(ended, streams, strict=True)):
            break
    return [text + stream.end() for text, stream in zip(texts, streams, strict=True)], tokens


def _read(path: Path) -> list[str]:
    try:
        read = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    if not read:
        raise UsageError(f"{path} is empty")
    return read.removesuffix("\n").split("\n")


def _share(given: str) -> float:
    value = number(0, 1)(given)
    if value == 0:
        raise argparse.ArgumentTypeError("0 excludes every token")
    return value
