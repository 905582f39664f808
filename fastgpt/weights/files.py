"""Tensors in files and in memory: names, shapes and dtypes first, then a few rows at a time.

Files are memory-mapped, and mapped again for every read: pages once read stay resident as long as
their mapping, so this keeps only a small part of a checkpoint in memory.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.atomic_files import utf_8_path
from fastgpt.weights.names import Shape, WeightsError, unwrapped

NEEDS_HUB = "safetensors and huggingface_hub are needed: pip install safetensors huggingface_hub"

# The dtypes of weights, of masks and of what is quantised, by their names in a safetensors header.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Files of weights, in the order in which they are looked for.
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pth",
)
# The key of the state dict in checkpoints: the book's, Lightning's, nanoGPT's.
_UNDER = ("model_state_dict", "state_dict", "model")
Read = Callable[[str], Any]


class Stored(NamedTuple):
    """What is known of a tensor before it is read; tensors with equal places are the same."""

    shape: Shape
    dtype: torch.dtype | None
    place: Any


class Source:
    """Named tensors. Names are without wrappers; ``_at`` says where each tensor is."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.stored: dict[str, Stored] = {}
        self._at: dict[str, Any] = {}

    def opened(self) -> AbstractContextManager[Read]:
        """Yields a function from a name to what can be sliced, as long as the block runs."""
        raise NotImplementedError

    def _add(self, name: str, stored: Stored, at: Any) -> None:
        short = unwrapped(name)
        if short in self.stored:
            raise WeightsError(f"{self.label} has {short} twice")
        self.stored[short] = stored
        self._at[short] = at


class Memory(Source):
    """A mapping of tensors or arrays, nested or flat."""

    def __init__(self, tensors: Mapping[str, Any], label: str) -> None:
        super().__init__(label)
        for name, value in _flattened(tensors):
            try:
                tensor = _as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                raise WeightsError(
                    f"{label}: {name} is a {type(value).__name__}, not a tensor"
                ) from None
            self._add(name, Stored(tuple(tensor.shape), tensor.dtype, _place(tensor)), value)

    @contextmanager
    def opened(self) -> Iterator[Read]:
        yield lambda name: _as_tensor(self._at[name])


class Safetensors(Source):
    """One safetensors file, or the shards of one checkpoint."""

    def __init__(self, paths: Sequence[Path], label: str) -> None:
        super().__init__(label)
        self._paths = {str(path): path for path in paths}
        with ExitStack() as stack:
            for path in self._paths:
                file = stack.enter_context(_safe_open(path))
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype())
                    at = (path, name)
                    self._add(name, Stored(tuple(part.get_shape()), dtype, at), at)
                # save_model stores one name of a shared tensor; its metadata has the others.
                for name, kept in (file.metadata() or {}).items():
                    if unwrapped(kept) in self.stored and unwrapped(name) not in self.stored:
                        self._add(name, self.stored[unwrapped(kept)], self._at[unwrapped(kept)])

    @contextmanager
    def opened(self) -> Iterator[Read]:
        files: dict[str, Any] = {}
        with ExitStack() as stack:

            def read(name: str) -> Any:
                path, stored_name = self._at[name]
                if path not in files:
                    files[path] = stack.enter_context(_safe_open(path))
                return files[path].get_slice(stored_name)

            yield read


class Pickled(Source):
    """Files of torch.save: a state dict, its shards, or a checkpoint with one under a key of
    ``_UNDER``.

    Files from before PyTorch 1.6 cannot be mapped, and are loaded whole.
    """

    def __init__(self, paths: Sequence[Path], label: str) -> None:
        super().__init__(label)
        self._whole = {p: _loaded(p) for p in paths if not zipfile.is_zipfile(p)}
        for path in paths:
            for name, value in self._state(path).items():
                if not (isinstance(name, str) and isinstance(value, Tensor)):
                    raise WeightsError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
                if value.layout != torch.strided or value.is_quantized or value.is_nested:
                    raise WeightsError(f"{path}: {name} is not a dense tensor")
                if value.is_meta or value.nbytes > value.untyped_storage().nbytes():
                    raise WeightsError(f"{path}: {name} {list(value.shape)} has too few values")
                stored = Stored(tuple(value.shape), value.dtype, (path, *_place(value)))
                self._add(name, stored, (path, name))

    def _state(self, path: Path) -> Mapping[str, Any]:
        state = self._whole[path] if path in self._whole else _loaded(path)
        if isinstance(state, Mapping):
            state = next((v for n in _UNDER if isinstance(v := state.get(n), Mapping)), state)
        if not isinstance(state, Mapping):
            raise WeightsError(f"{path} contains a {type(state).__name__}, not a state dict")
        inside = [f"{name!r}" for name, value in state.items() if _has_tensors(value)]
        if inside:
            raise WeightsError(
                f"{path} is not a state dict, but has tensors under {' and '.join(inside)}: save "
                "the model's weights in a file of their own"
            )
        return state

    @contextmanager
    def opened(self) -> Iterator[Read]:
        states: dict[Path, Mapping[str, Any]] = {}

        def read(name: str) -> Any:
            path, stored_name = self._at[name]
            if path not in states:
                states[path] = self._state(path)
            return states[path][stored_name].detach()

        yield read
        states.clear()


def open_file(path: Path) -> Source:
    """The tensors of one file, or of the shards that an index names.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    if not path.is_file():  # a pipe would have to be read twice
        raise WeightsError(f"{path} is not a regular file")
    if path.name.endswith(".index.json"):
        shards = _shards(path)
        if all(shard.suffix == ".safetensors" for shard in shards):
            return Safetensors(shards, str(path))
        return Pickled(shards, str(path))
    if path.suffix == ".safetensors":
        return Safetensors([path], str(path))
    return Pickled([path], str(path))


def read_json(path: Path) -> Any:
    """The content of a JSON file; WeightsError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from None


def _shards(index: Path) -> list[Path]:
    data = read_json(index)
    files = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise WeightsError(f"{index} has no weight_map")
    names = sorted(set(files.values()))
    outside = [name for name in names if Path(name).name != name or not name.isprintable()]
    if outside:
        raise WeightsError(f"{index} names files outside its folder: {', '.join(outside)}")
    missing = [name for name in names if not os.path.isfile(index.parent / name)]
    if missing:
        raise WeightsError(f"{index} names files that are missing: {', '.join(missing)}")
    return [index.parent / name for name in names]


def _safe_open(path: str) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(f"{path}: {NEEDS_HUB}") from None
    try:  # open() says why it fails; safetensors calls every file missing
        with open(path, "rb"), utf_8_path(path) as name:
            return safe_open(name, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from None


def _loaded(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)
    try:
        if mapped:
            _check_stored(path)
        with utf_8_path(path) as name:
            return torch.load(name, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # The rest of the message advises to run the file's code.
        lines = str(error).partition("WeightsUnpickler error:")[2].split("\n")
        reason = next(filter(str.strip, lines), "not a pickle").strip().partition(". ")[0]
        raise WeightsError(
            f"{path} cannot be read as weights only, which runs no code from the file. If it is a "
            f"pickled model, save model.state_dict() instead. ({reason})"
        ) from None
    except EOFError:
        raise WeightsError(f"{path} cannot be read: it is truncated") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise  # it says nothing of the file
    except Exception as error:  # of any kind: a pickle decides what is called with what
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"{path} cannot be read: {reason}") from None


def _check_stored(path: Path) -> None:
    """Raises ValueError unless the archive's files are stored as they are: torch.save compresses
    nothing, and a mapping of what is compressed would have other values.
    """
    with zipfile.ZipFile(path) as archive:
        for file in archive.infolist():
            if file.compress_type != zipfile.ZIP_STORED or file.file_size != file.compress_size:
                raise ValueError(f"{file.filename} is compressed, which torch.save never does")


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _place(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), tensor.storage_offset(), tensor.stride()


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    flags = getattr(value, "flags", None)
    # PyTorch shares memory only with writable arrays without negative strides.
    if flags is None or not flags.writeable or any(step < 0 for step in value.strides):
        return torch.tensor(value)
    return torch.as_tensor(value)


def _flattened(tensors: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = tensors.items() if isinstance(tensors, Mapping) else enumerate(tensors)
    for key, value in items:
        if isinstance(value, (Mapping, list, tuple)):
            yield from _flattened(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
