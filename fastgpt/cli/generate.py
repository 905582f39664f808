"""`fastgpt generate`: streams text from a model, or answers a file of prompts in batches."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from fastgpt.cli.progress import bar_on_terminal
from fastgpt.cli.prompts import FORMATS, Entry, answer_line, prompt_of, read_entries, resumed
from fastgpt.cli.quantize import add_precision
from fastgpt.cli.usage import Commands, UsageError, add_device, number, positive, seed, text
from fastgpt.model.batch_generation import generate_batch_stream
from fastgpt.model.generation import generate_stream
from fastgpt.model.gpt import GPTModel
from fastgpt.tokenizer import END_OF_TEXT, EncodingError, TextStream, gpt2_encoding
from fastgpt.training.settings import SettingsError, check_token, load_model, pick_device

if TYPE_CHECKING:
    import tiktoken

DTYPES = ("float32", "bfloat16", "float16")


def add_to(commands: Commands) -> None:
    sub = commands.add_parser(
        "generate",
        help="generate text with a model",
        description="Print PROMPT and the model's continuation as it is generated. With --prompts, "
        "answer each prompt of FILE, several at once, and print a line for each, in order. Prompt "
        "i, from 0, is answered as alone with --seed N + i.",
    )
    sub.add_argument("prompt", nargs="?", type=text, metavar="PROMPT")
    sub.add_argument(
        "--model", required=True, metavar="MODEL", help="gpt2, or a folder or file of weights"
    )
    sub.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one prompt per line; in .jsonl an object per line, in .json a list of objects, with "
        "a prompt or with chapter 7's instruction and input",
    )
    sub.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="append the lines to this file, after those of an interrupted run",
    )
    sub.add_argument(
        "--format",
        choices=FORMATS,
        help="of a line: the prompt's object with its answer, or the answer alone, its line breaks "
        f"replaced by spaces ({FORMATS[0]})",
    )
    sub.add_argument("--batch", type=positive, default=32, metavar="N", help="prompts at once (32)")
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
    _check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    entries = [{"prompt": args.prompt}] if args.prompts is None else read_entries(args.prompts)
    if args.seed + len(entries) > 1 << 64:
        raise UsageError(f"--seed {args.seed} is too large for {len(entries)} prompts")
    try:
        options = {"quantize": args.quantize, "dtype": getattr(torch, args.dtype)}
        model = load_model(args.model, **options).eval().to(pick_device(args.device))
        encoding = gpt2_encoding()
        # An empty prompt starts a new text.
        texts = [prompt_of(entry) or END_OF_TEXT for entry in entries]
        ids = [encoding.encode(text, allowed_special={END_OF_TEXT}) for text in texts]
        check_token("a prompt", max(map(max, ids)), model.cfg)
    except (SettingsError, EncodingError) as error:
        raise UsageError(error) from None
    if args.prompts is None:
        _stream(model, encoding, ids[0], args)
    elif args.output is None:
        _answer(model, encoding, entries, ids, args, sys.stdout)
    else:
        with resumed(args.output, _settings(model, entries, args), len(ids)) as (file, done):
            if done:
                print(f"{args.output}: {done} of {len(ids)} were done before", file=sys.stderr)
            _answer(model, encoding, entries, ids, args, file, done)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError if the options contradict each other."""
    if (args.prompt is None) == (args.prompts is None):
        raise UsageError("give either a prompt or --prompts FILE")
    if args.prompts is None and (args.output or args.format):
        raise UsageError("--output and --format need --prompts FILE")
    if args.temperature == 0 and (args.top_k or args.top_p):
        raise UsageError("--top-k and --top-p need a --temperature above 0")


class _Continuation:
    """What follows a prompt, up to a stop text, the end of the text or the most new tokens."""

    def __init__(self, encoding: tiktoken.Encoding, args: argparse.Namespace) -> None:
        self.stream, self.most = TextStream(encoding, args.stop), args.max_new_tokens
        self.text, self.tokens, self.ended = "", 0, False

    def add(self, token: int) -> str:
        """Takes a token and returns the text that can be shown now."""
        shown, end = "", token == self.stream.encoding.eot_token
        if not end:
            self.tokens += 1
            shown = self.stream.add(token)
        self.ended = end or self.stream.stopped or self.tokens == self.most
        if self.ended:
            shown += self.stream.end()
        self.text += shown
        return shown


def _stream(
    model: GPTModel, encoding: tiktoken.Encoding, ids: list[int], args: argparse.Namespace
) -> None:
    """Prints the prompt and its continuation as it is generated."""
    print(args.prompt, end="", flush=True)
    torch.manual_seed(args.seed)
    start, continuation = time.perf_counter(), _Continuation(encoding, args)
    prompt = torch.tensor([ids], device=model.pos_emb.weight.device)
    for step in generate_stream(model, prompt, **_options(model, args)):
        print(continuation.add(int(step)), end="", flush=True)
        if continuation.ended:
            break
    print(flush=True)
    print(_speed(continuation.tokens, start), file=sys.stderr)


def _answer(
    model: GPTModel,
    encoding: tiktoken.Encoding,
    entries: Sequence[Entry],
    ids: Sequence[list[int]],
    args: argparse.Namespace,
    file: TextIO,
    done: int = 0,
) -> None:
    """Writes a line for each entry that is not done, in order and as soon as it can be."""
    running = defaultdict[int, _Continuation](lambda: _Continuation(encoding, args))
    ended: dict[int, str] = {}  # the texts that wait for an earlier one
    first, tokens, start, shown = done, 0, time.perf_counter(), 0.0

    def ends(number: int, token: int) -> bool:
        running[number].add(token)
        return running[number].ended

    stream = generate_batch_stream(
        model,
        ids[done:],
        **_options(model, args),
        seed=args.seed + done,
        batch_size=args.batch,
        ends=ends,
    )
    # Lines that are printed on a terminal are progress enough.
    with bar_on_terminal(wanted=file is not sys.stdout or not file.isatty()) as show:
        for number, token in stream:
            tokens += token != encoding.eot_token
            if running[number].ended:
                ended[first + number] = running.pop(number).text
            while done in ended:
                line = answer_line(entries[done], ended.pop(done), args.format or FORMATS[0])
                file.write(f"{line}\n")
                file.flush()
                done += 1
            if time.perf_counter() - shown > 0.1:
                shown = time.perf_counter()
                show(done + len(ended), len(ids), _speed(tokens, start))
        show(done, len(ids), "")
    print(_speed(tokens, start), file=sys.stderr)


def _options(model: GPTModel, args: argparse.Namespace) -> dict[str, Any]:
    """How one prompt is continued, as arguments of the generating functions."""
    return {
        "max_new_tokens": args.max_new_tokens,
        "context_size": model.cfg["context_length"],
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
    }


def _speed(tokens: int, start: float) -> str:
    seconds = time.perf_counter() - start
    return f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s"


def _settings(
    model: GPTModel, entries: Sequence[Entry], args: argparse.Namespace
) -> dict[str, Any]:
    """What the lines depend on, by the option that sets it."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "quantize", "dtype")
    found = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    weights = 0
    for tensor in (*model.parameters(), *model.buffers()):
        data = tensor.detach().cpu().contiguous()
        size = data.numel() * data.element_size()
        weights = zlib.crc32((ctypes.c_char * size).from_address(data.data_ptr()), weights)
    return found | {
        "--format": args.format or FORMATS[0],
        "--model": f"{weights:08x}",
        "--prompts": hashlib.sha256(json.dumps(entries).encode()).hexdigest(),
    }


def _share(given: str) -> float:
    value = number(0, 1)(given)
    if value == 0:
        raise argparse.ArgumentTypeError("0 excludes every token")
    return value
