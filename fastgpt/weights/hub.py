"""Finds weights by name or path: a folder, a file, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from fastgpt.weights.files import NAMES, NEEDS_HUB, Source, open_file, read_json
from fastgpt.weights.names import WeightsError
from fastgpt.weights.save import CONFIG, WEIGHTS, cut_short
from fastgpt.weights.sizes import Sizes, from_json

_GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
# safetensors first; the second is fetched only if the first has no weights.
_WANTED = (
    ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    ("config.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
)


def locate(name_or_path: str | os.PathLike[str], **options: Any) -> tuple[Source, Sizes]:
    """The tensors, and the sizes from the config beside them.

    Args:
        name_or_path: a folder, a file, or a repository of the Hub.
        options: revision, cache_dir, token, local_files_only, for the Hub.

    Raises:
        FileNotFoundError: there is no such file, or it is neither on the Hub nor in its cache; the
            message says how to fetch it.
        WeightsError: a file cannot be read.
        ImportError: the extra 'hub' is needed and not installed.
    """
    path, text = Path(name_or_path), os.fspath(name_or_path)
    if not path.exists() and _is_repository(text):
        path = _fetched(text, options)
    if _is_tensorflows(path):
        raise WeightsError(
            f"{text} is OpenAI's TensorFlow checkpoint: read it with the book's "
            "load_gpt2_params_from_tf_ckpt and pass the result to load_weights_into_gpt, or load "
            "the same weights from the Hugging Face Hub as openai-community/gpt2 (or -medium, "
            "-large, -xl)"
        )
    if not path.exists():
        raise FileNotFoundError(f"{text} is neither a local path nor a Hugging Face Hub repository")
    file = _weights_in(path) if path.is_dir() else path
    if file is None:
        hub = f"; on the Hub it is openai-community/{path}" if str(path) in _GPT2 else ""
        raise FileNotFoundError(f"{path} contains none of {', '.join(NAMES)}{hub}")
    if file.name == WEIGHTS and cut_short(file.parent):
        raise WeightsError(f"a save to {file.parent} was interrupted: save the model there again")
    config = file.parent / CONFIG
    sizes = from_json(read_json(config), str(config)) if config.is_file() else Sizes()
    return open_file(file), sizes


def _is_repository(name: str) -> bool:
    suffixes = (".pth", ".pt", ".bin", ".safetensors", ".json")
    return (
        bool(_REPOSITORY.fullmatch(name))
        and not name.startswith(".")
        and not name.endswith(suffixes)
    )


def _weights_in(folder: Path) -> Path | None:
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def _is_tensorflows(path: Path) -> bool:
    """Whether it is the folder of the book's download, its parent, or one of its files."""
    if path.is_dir():
        names = ("model.ckpt*", "*/model.ckpt*")
        return _weights_in(path) is None and any(any(path.glob(name)) for name in names)
    of_it = path.name == "checkpoint" or path.name.startswith("model.ckpt")
    return of_it and any(path.parent.glob("model.ckpt*"))


def _fetched(name: str, options: dict[str, Any]) -> Path:
    """The repository's folder in the Hub's cache, downloaded if necessary."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ImportError(f"{name!r} is not a local path; for the Hub, {NEEDS_HUB}") from None
    repository = f"openai-community/{name}" if name in _GPT2 else name
    problems = (errors.HfHubHTTPError, errors.HFValidationError, OSError)
    try:
        for wanted in _WANTED:
            folder = Path(snapshot_download(repository, allow_patterns=list(wanted), **options))
            if _weights_in(folder):
                return folder
    except problems as error:
        cached = _cached(name, options) if repository != name else None
        if cached is not None:
            return cached
        files, reason = " ".join(_WANTED[0][:2]), str(error) or type(error).__name__
        raise FileNotFoundError(
            f"{name!r} is not a local path, and cannot be downloaded from the Hugging Face Hub "
            f"({reason.splitlines()[0]}). On a machine with a connection, run\n"
            f"  hf download {repository} {files} --local-dir {name.rpartition('/')[2]}\n"
            "and give the path of that folder instead of the name."
        ) from error
    raise FileNotFoundError(
        f"{repository} on the Hugging Face Hub contains none of {', '.join(NAMES)}"
    )


def _cached(name: str, options: dict[str, Any]) -> Path | None:
    """The folder in the Hub's cache of an earlier download under the short name."""
    from huggingface_hub import snapshot_download

    options = {**options, "local_files_only": True}
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_WANTED[0]), **options))
    except OSError:
        return None
    return folder if _weights_in(folder) else None
