"""`fastgpt generate`: text from a model, streamed; or a file of prompts, in batches."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastgpt.cli.usage import Commands, UsageError, number, positive, seed, text, threads
from fastgpt.generate import generate_stream
from fastgpt.model import GPTModel
from fastgpt.text_stream import TextStream
from fastgpt.tokenizer import END_OF_TEXT, EncodingError, gpt2_encoding
from fastgpt.training.device import pick_device
from fastgpt.training.model_files import load_model
from fastgpt.training.settings import SettingsError

if TYPE_CHECKING:
    import tiktoken


def add_to(commands: Commands) -> None:
    sub = commands.add_parser(
        "generate",
        help="generate text with a model",
        description="Print PROMPT and what the model goes on with, as it comes. With --prompts, "
        "one JSON object a line instead, in the order of the file.",
    )
    sub.add_argument("prompt", nargs="?", type=text, metavar="PROMPT")
    sub.add_argument(
        "--model", required=True, metavar="MODEL", help="train's folder, gpt2, any folder or file"
    )
    sub.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line")
    sub.add_argument("--batch", type=positive, default=8, metavar="N", help="prompts at once (8)")
    sub.add_argument("--max-new-tokens", type=positive, default=100, metavar="N", help="(100)")
    sub.add_argument(
        "--temperature", type=number(0), default=0.0, metavar="T", help="0 takes the likeliest (0)"
    )
    sub.add_argument("--top-k", type=positive, metavar="N", help="draw from the N likeliest")
    sub.add_argument("--top-p", type=_share, metavar="P", help="draw from those that add up to P")
    sub.add_argument("--seed", type=seed, default=123, metavar="N", help="(%(default)s)")
    sub.add_argument(
        "--stop",
        action="append",
        type=text,
        default=[],
        metavar="TEXT",
        help="end before it; repeatable",
    )
    sub.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="(%(default)s)"
    )
    sub.add_argument("--threads", type=threads, metavar="N", help="default: as many as torch uses")
    sub.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    if (args.prompt is None) == (args.prompts is None):
        raise UsageError("give either a prompt or --prompts FILE")
    if args.temperature == 0 and (args.top_k or args.top_p):
        raise UsageError("--top-k and --top-p say what to draw from: give a --temperature above 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    prompts = [args.prompt] if args.prompts is None else _read(args.prompts)
    try:
        model = load_model(args.model).eval().to(pick_device(args.device))
        encoding = gpt2_encoding()
    except (SettingsError, EncodingError) as error:
        raise UsageError(error) from None
    # An empty prompt starts a new text.
    ids = [encoding.encode(p or END_OF_TEXT, allowed_special={END_OF_TEXT}) for p in prompts]
    largest = max(map(max, ids), default=0)
    if largest >= model.cfg["vocab_size"]:
        raise UsageError(
            f"a prompt has token {largest}, the model a vocabulary of {model.cfg['vocab_size']}"
        )
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    if args.prompts is None:
        tokens = _stream(model, encoding, args.prompt, ids[0], args)
    else:
        tokens = _batches(model, encoding, prompts, ids, args)
    seconds = time.perf_counter() - start
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def _stream(
    model: GPTModel,
    encoding: tiktoken.Encoding,
    prompt: str,
    ids: list[int],
    args: argparse.Namespace,
) -> int:
    """Prints as it goes; returns how many tokens came."""
    print(prompt, end="", flush=True)
    stream, tokens = TextStream(encoding, args.stop), 0
    for (token,) in _tokens(model, encoding, [ids], args):
        tokens += 1
        print(stream.add(token), end="", flush=True)
        if stream.stopped:
            break
    print(stream.end(), flush=True)
    return tokens


def _batches(
    model: GPTModel,
    encoding: tiktoken.Encoding,
    prompts: Sequence[str],
    ids: Sequence[list[int]],
    args: argparse.Namespace,
) -> int:
    """Prints a line for each prompt; returns how many tokens came, of prompts not yet ended.

    Prompts of as many tokens go together: the model knows no padding.
    """
    done: dict[int, str] = {}
    tokens = 0
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for _, alike in itertools.groupby(order, key=lambda i: len(ids[i])):
        numbers = list(alike)
        for first in range(0, len(numbers), args.batch):
            batch = numbers[first : first + args.batch]
            texts, came = _complete(model, encoding, [ids[i] for i in batch], args)
            done.update(zip(batch, texts, strict=True))
            tokens += came
    for i, prompt in enumerate(prompts):
        print(json.dumps({"prompt": prompt, "text": done[i]}, ensure_ascii=False))
    return tokens


def _complete(
    model: GPTModel,
    encoding: tiktoken.Encoding,
    ids: list[list[int]],
    args: argparse.Namespace,
) -> tuple[list[str], int]:
    streams = [TextStream(encoding, args.stop) for _ in ids]
    texts, ended, tokens = [""] * len(ids), [False] * len(ids), 0
    for step in _tokens(model, encoding, ids, args):
        for row, token in enumerate(step):
            ended[row] = ended[row] or streams[row].stopped or token == encoding.eot_token
            if not ended[row]:
                tokens += 1
                texts[row] += streams[row].add(token)
        if all(over or stream.stopped for over, stream in zip(ended, streams, strict=True)):
            break
    return [text + stream.end() for text, stream in zip(texts, streams, strict=True)], tokens


def _tokens(
    model: GPTModel,
    encoding: tiktoken.Encoding,
    ids: list[list[int]],
    args: argparse.Namespace,
) -> Iterator[list[int]]:
    """Each step's tokens, one a prompt."""
    stream = generate_stream(
        model,
        torch.tensor(ids, device=model.tok_emb.weight.device),
        args.max_new_tokens,
        model.cfg["context_length"],
        args.temperature,
        args.top_k,
        eos_id=encoding.eot_token,
        top_p=args.top_p,
    )
    return (step[:, 0].tolist() for step in stream)


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
        raise argparse.ArgumentTypeError("0 leaves no token")
    return value
