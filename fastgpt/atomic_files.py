"""Files and folders that appear complete or not at all, even if the process is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".unfinished-"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write. It replaces the one at path if the block ends without an error.

    Also removes what killed processes that wrote the same file left behind. Of several that write
    it at once, the last to end wins.
    """
    unfinished = _unfinished(path)
    for left in path.parent.glob(f"{UNFINISHED}*"):
        process, _, name = left.name.removeprefix(UNFINISHED).partition("-")
        if name == path.name and process.isdecimal() and not _runs(int(process)):
            with contextlib.suppress(OSError):
                left.unlink()
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
    """Yields a folder to fill. It becomes path, which must not exist, if the block ends without
    an error.
    """
    unfinished = _unfinished(path)
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
    """Holds an exclusive lock on the folder, against all other processes, while the block runs.

    Does nothing on Windows, and on file systems without locks.

    Args:
        wait: until another process releases the lock; if False, raise instead.

    Raises:
        BlockingIOError: another process holds the lock, and wait is False.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:  # if the process dies, the system releases the lock
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def regular(path: Path) -> Path:
    """The path. OSError if a pipe or a device stands there, which may have no end to read to."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


@contextlib.contextmanager
def utf_8_path(path: str | Path) -> Iterator[str]:
    """A path to the file that is valid UTF-8, which torch and safetensors need to map a file."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield os.fspath(path)


def clear_unfinished(folder: Path, prefix: str = UNFINISHED) -> None:
    """Removes what killed processes left behind, as far as the system permits."""
    for path in folder.glob(f"{prefix}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Replaces target by source in one step: by a hard link if the file system has them."""
    unfinished = _unfinished(target)
    unfinished.unlink(missing_ok=True)
    try:
        try:
            os.link(source, unfinished)
        except OSError:
            shutil.copyfile(source, unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def sync_files(folder: Path) -> None:
    """Flushes a folder's files to the disk."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flushes a rename in this folder to the disk; not on Windows, which can't open folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _runs(process: int) -> bool:
    """Whether there is a process of this number. Not known on Windows, which lets nobody remove
    the file that it is writing.
    """
    if os.name == "nt":  # where a signal of 0 would end it
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def _unfinished(path: Path) -> Path:
    """Where this process writes what will be renamed to path."""
    return path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
