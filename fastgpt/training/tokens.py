"""Texts as a file of token ids: written once, then memory-mapped, so it may be of any size.

The ids are stored as uint16, or as uint32 if the vocabulary needs it, with <|endoftext|> between
texts. A JSON file beside them has their count and source. It is written last, so a token file
without one is unfinished.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TextIO

import torch
from torch import Tensor

from fastgpt.atomic_files import only_writer, regular, utf_8_path, whole_file
from fastgpt.config import check_whole_number
from fastgpt.tokenizer import END_OF_TEXT

if TYPE_CHECKING:
    import tiktoken

PIECE = 1 << 18  # characters per call of the tokenizer
LONGEST = 16 * PIECE  # characters at which a piece is cut even without a good place
ORDINARY_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


class TextError(ValueError):
    """A text that can't be trained on; the message names it."""


class TokenFile(NamedTuple):
    """Token ids on disk."""

    path: Path
    length: int
    largest: int  # the largest id
    digest: str  # SHA-256 of the ids
    dtype: torch.dtype

    def ids(self) -> Tensor:
        """[length], memory-mapped from the file."""
        with utf_8_path(self.path) as path:
            return torch.from_file(path, shared=False, size=self.length, dtype=self.dtype)


def text_files(texts: Iterable[str | Path]) -> list[Path]:
    """The files given, and for each folder every *.txt file below it, sorted by path.

    Raises:
        TextError: a file is missing or empty, or a folder has no .txt file.
    """
    files: list[Path] = []
    for text in map(Path, texts):
        if text.is_dir():
            found = sorted(path for path in text.rglob("*.txt") if path.is_file())
            if not found:
                raise TextError(f"{text} has no .txt file")
            files += found
        elif text.is_file():
            files.append(text)
        else:
            raise TextError(f"{text}: no such file")
    for path in files:
        if path.stat().st_size == 0:
            raise TextError(f"{path} is empty")
    return files


def tokenise(
    files: Sequence[Path],
    folder: Path,
    encoding: tiktoken.Encoding,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> TokenFile:
    """The token file of these texts in the folder; it is written if it doesn't exist.

    Args:
        files: UTF-8 texts; if one has changed, a new token file is written.
        folder: created if missing.
        encoding: tiktoken's.
        progress: called with the bytes read so far and their total.

    Raises:
        TextError: a text isn't UTF-8. Nothing is left behind.
    """
    states = [(path.resolve(), path.stat()) for path in files]
    key = [encoding.name, *([str(p), s.st_size, s.st_mtime_ns] for p, s in states)]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = folder / f"tokens-{name}.bin"
    made = open_tokens(path)
    if made is not None:
        return made
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(state.st_size for _, state in states)
    with only_writer(folder):
        made = open_tokens(path)  # by the process that this one waited for
        if made is not None:
            return made
        with whole_file(path) as out:
            facts = _write(files, encoding, out, lambda done: progress(done, total))
        with whole_file(path.with_suffix(".json")) as out:
            out.write(json.dumps(facts | {"texts": [str(p) for p, _ in states]}, indent=1).encode())
    made = open_tokens(path)
    if made is None:
        raise TextError(f"{path} was changed by another program while it was written")
    return made


def open_tokens(path: Path) -> TokenFile | None:
    """The token file at this path, or None if there is none, or it is unfinished or damaged."""
    try:
        facts = json.loads(regular(path.with_suffix(".json")).read_text())
        for name in ("count", "largest"):
            check_whole_number(name, facts[name], 0)
        dtype = {2: torch.uint16, 4: torch.uint32}[facts["bytes_per_id"]]
        if path.stat().st_size != facts["count"] * facts["bytes_per_id"]:
            return None
        made = TokenFile(path, facts["count"], facts["largest"], facts["digest"], dtype)
        digest = hashlib.sha256()
        with regular(path).open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        return made if digest.hexdigest() == made.digest else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(
    files: Sequence[Path],
    encoding: tiktoken.Encoding,
    out: BinaryIO,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    code = "H" if encoding.n_vocab <= 1 << 16 else "I"
    digest, count, largest, before = hashlib.sha256(), 0, 0, 0
    for number, path in enumerate(files):
        # utf-8-sig: a byte order mark is not text.
        with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as text:
            for rows in _encoded(pieces(text, path), encoding, first=number == 0):
                ids = array(code, itertools.chain.from_iterable(rows))
                out.write(ids)
                digest.update(ids)
                count, largest = count + len(ids), max(largest, max(ids, default=0))
                progress(before + raw.tell())
        before += path.stat().st_size
    size = array(code).itemsize
    return {"count": count, "largest": largest, "digest": digest.hexdigest(), "bytes_per_id": size}


def _encoded(
    texts: Iterator[str], encoding: tiktoken.Encoding, first: bool
) -> Iterator[list[list[int]]]:
    threads = min(8, os.cpu_count() or 1)
    special = encoding.special_tokens_set & {END_OF_TEXT}
    if not first and special:
        yield [[encoding.eot_token]]
    while batch := list(itertools.islice(texts, threads)):
        yield encoding.encode_batch(batch, num_threads=threads, allowed_special=special)


def pieces(text: TextIO, path: Path, size: int = PIECE) -> Iterator[str]:
    """Cuts a text into pieces of about that many characters without changing its tokens.

    No token of GPT-2 contains a visible character followed by a space or line break, so the text
    is cut between the two.

    Raises:
        TextError: the text isn't UTF-8.
    """
    held, lines = "", 1
    try:
        while chunk := text.read(size):
            lines += chunk.count("\n")
            held += chunk
            match = ORDINARY_CUT.match(held)
            cut = match.end() if match else len(held) if len(held) > LONGEST else 0
            if cut:
                yield held[:cut]
                held = held[cut:]
        if held:
            yield held
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise TextError(
            f"{path} is not UTF-8 text: byte 0x{byte:02x} at line {lines} or shortly after"
        ) from None
