"""Files and folders that are whole or not there."""

import contextlib
import os
import subprocess
import sys

from fastgpt import atomic_files


def test_two_processes_write_one_file_at_once(tmp_path):
    path = tmp_path / "file"
    code = "import pathlib, sys; from fastgpt.atomic_files import whole_file as whole\n"
    code += "with whole(pathlib.Path(sys.argv[1])) as file: file.write(b'other')"
    with atomic_files.whole_file(path) as file:
        file.write(b"first")
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=120)
        assert path.read_text() == "other"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    names = [f".unfinished-{process}-file" for process in (ended.pid, os.getppid(), 10**30)]
    for name in [*names, f"{names[0]}2", ".unfinished-x-file"]:
        (tmp_path / name).touch()
    with atomic_files.whole_file(tmp_path / "file") as file:
        file.write(b"new")
    left = {"file", names[1], f"{names[0]}2", ".unfinished-x-file"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with contextlib.suppress(KeyError), atomic_files.whole_file(path) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_text() == "old"
    with contextlib.suppress(KeyError), atomic_files.whole_folder(tmp_path / "folder") as folder:
        (folder / "x").write_text("x")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with atomic_files.whole_folder(tmp_path / "folder") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "folder" / "x").read_text() == "x"
    atomic_files.link_or_copy(tmp_path / "folder" / "x", path)
    assert path.read_text() == "x"
