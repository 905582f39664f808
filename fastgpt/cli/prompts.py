"""The files of `fastgpt generate --prompts`: the prompts, and the answers, which can be resumed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from fastgpt.atomic_files import only_writer, regular, whole_file
from fastgpt.cli.usage import UsageError
from fastgpt.training import format_input

Entry = dict[str, Any]
FORMATS = ("jsonl", "text")


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file, each with a "prompt" or with chapter 7's "instruction".

    A file named .json or .jsonl contains a list of objects or an object per line; any other file a
    prompt per line.

    Raises:
        UsageError: it is unreadable or empty, or an entry is neither.
    """
    try:
        read = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    if not read:
        raise UsageError(f"{path} is empty")
    if path.suffix.lower() not in (".json", ".jsonl"):
        return [{"prompt": line} for line in read.removesuffix("\n").split("\n")]
    if read.lstrip().startswith("["):
        found = [(f"entry {i}", entry) for i, entry in enumerate(_parsed(path, "", read), 1)]
    else:
        lines = [(f"line {i}", line) for i, line in enumerate(read.split("\n"), 1) if line.strip()]
        found = [(where, _parsed(path, f", {where},", line)) for where, line in lines]
    if not found:
        raise UsageError(f"{path} contains no prompts")
    return [_checked(path, where, entry) for where, entry in found]


def _parsed(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}{where} is not JSON: {error}") from None


def _checked(path: Path, where: str, entry: Any) -> Entry:
    if not isinstance(entry, dict) or not {"prompt", "instruction"} & entry.keys():
        raise UsageError(f'{path}, {where}, is not an object with a "prompt" or an "instruction"')
    for name in ("prompt", "instruction", "input"):
        if not isinstance(entry.get(name, ""), str):
            raise UsageError(f'{path}, {where}: "{name}" is not a string')
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{path}, {where}, contains half a surrogate pair") from None
    except RecursionError:
        raise UsageError(f"{path}, {where}, is nested too deeply") from None
    return entry


def prompt_of(entry: Entry) -> str:
    prompt: str = entry["prompt"] if "prompt" in entry else format_input(entry)
    return prompt


def answer_line(entry: Entry, text: str, kind: str) -> str:
    """The line that answers an entry, of one of FORMATS: the answer alone, its line breaks replaced
    by spaces, or the entry with the answer under "text", or under chapter 7's "model_response".
    """
    name = "text"
    if "prompt" not in entry:
        name, text = "model_response", text.replace("### Response:", "").strip()
    if kind == "text":
        return " ".join(text.splitlines())
    return json.dumps(entry | {name: text}, ensure_ascii=False)


@contextlib.contextmanager
def resumed(path: Path, settings: dict[str, Any], most: int) -> Iterator[tuple[TextIO, int]]:
    """Yields a file to append lines to, and how many it has from an interrupted run.

    The settings are kept beside it; a half-written last line is removed.

    Args:
        settings: what the lines depend on, by the option that sets it.
        most: lines of the finished file.

    Raises:
        UsageError: the file can't be written, or has lines that don't come from these settings.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(regular(path).open("a", encoding="utf-8", newline="\n"))
            stack.enter_context(only_writer(path, wait=False))
            written = path.read_bytes()
            beside = path.with_name(f"{path.name}.settings.json")
            if written:
                _check_settings(path, beside, settings)
            else:
                with whole_file(beside) as new:
                    new.write(json.dumps(settings, indent=1).encode())
        except BlockingIOError:
            raise UsageError(f"another process is writing {path}") from None
        except OSError as error:
            raise UsageError(f"{error.filename}: {error.strerror}") from None
        done = written.count(b"\n")
        if done > most:
            raise UsageError(f"{path} has {done} lines for {most} prompts; {_ELSE}")
        file.truncate(written.rfind(b"\n") + 1)
        yield file, done


_ELSE = "choose a different --output"


def _check_settings(path: Path, beside: Path, settings: dict[str, Any]) -> None:
    """Raises UsageError unless the file's lines come from these settings."""
    try:
        before = json.loads(regular(beside).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise UsageError(f"{path} exists, and no {beside.name} says how it was made; {_ELSE}")
    if others := [name for name, value in settings.items() if before.get(name) != value]:
        raise UsageError(f"{path} was written with another {' and '.join(others)}; {_ELSE}")
