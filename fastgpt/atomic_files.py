"""Files and folders that are there whole or not at all, whenever the process ends."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".unfinished-"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place at path when the block ends without an error."""
    unfinished = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that appears at path, which must be free, when the block ends well."""
    unfinished = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        sync_files(unfinished)
        unfinished.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def only_writer(folder: Path, wait: bool = True) -> Iterator[None]:
    """Runs while no other block of this kind does for the folder, in whatever process.

    Where the system or the file system has no such locks, all run.

    Raises:
        BlockingIOError: another one runs, and this one is not to wait for its end.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:  # the end of the process frees it too
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def utf_8_path(path: str | Path) -> Iterator[str]:
    """A name of the file that is UTF-8, as torch and safetensors need it to map the file."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield os.fspath(path)


def clear_unfinished(folder: Path, prefix: str = UNFINISHED) -> None:
    """Removes what killed processes left, as far as the system lets it."""
    for path in folder.glob(f"{prefix}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Puts source's content at target in one step, without a copy where the file system can."""
    unfinished = target.with_name(f"{UNFINISHED}{os.getpid()}-{target.name}")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:
        shutil.copyfile(source, unfinished)
    os.replace(unfinished, target)


def sync_files(folder: Path) -> None:
    """Puts a folder's files on the disk."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Puts a rename in this folder on the disk; Windows can't open folders, and does so itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
