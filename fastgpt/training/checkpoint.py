"""Checkpoints of a run: a folder each, complete or not there at all.

    DIR/run.json                     the run's settings
    DIR/config.json, *.safetensors   the model of the newest checkpoint
    DIR/checkpoints/step-00000100/   that model, optimizer.pt and state.json

A checkpoint holds full tensors under the parameters' names, so any number of processes can load it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fastgpt.atomic_files import (
    UNFINISHED,
    clear_unfinished,
    link_or_copy,
    only_writer,
    regular,
    utf_8_path,
    whole_file,
    whole_folder,
)
from fastgpt.config import check_config, check_whole_number
from fastgpt.model.gpt import GPTModel
from fastgpt.training.parallel import Group, gathered
from fastgpt.training.settings import Settings, SettingsError

RUN, CHECKPOINTS = "run.json", "checkpoints"
OPTIMIZER, STATE = "optimizer.pt", "state.json"


def checkpoints(out: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted((out / CHECKPOINTS).glob("step-*"))


def save(
    out: Path,
    step: int,
    model: GPTModel,
    optimizer: torch.optim.Optimizer,
    group: Group,
    keep: int,
) -> None:
    """Writes the checkpoint of a step, then removes all but the newest ``keep``.

    Raises:
        OSError: it can't be written; earlier checkpoints stay.
    """
    tensors = _full_tensors(model, group)
    optimizer_state = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=group.sharded)
    )
    path = out / CHECKPOINTS / f"step-{step:08d}"
    if group.rank == 0 and not path.exists():
        _write(path, model, tensors, optimizer_state, {"step": step, "processes": group.size})
        _publish(path, out)
        _remove_old(out, keep)


def _write(
    path: Path,
    model: GPTModel,
    tensors: dict[str, Tensor] | None,
    optimizer_state: Any,
    state: dict[str, int],
) -> None:
    """Writes a checkpoint's folder."""
    try:
        with whole_folder(path) as folder:
            model.save_pretrained(folder, tensors)
            with (folder / OPTIMIZER).open("wb") as file:  # Python says why a write fails
                torch.save(optimizer_state, file)
            (folder / STATE).write_text(json.dumps(state))
    except (RuntimeError, OSError) as error:  # for example when the disk is full
        why = error.__context__ if isinstance(error.__context__, OSError) else error
        free, reason = shutil.disk_usage(path.parent).free, " ".join(str(why).split())
        message = f"{path} can't be written ({free / 1e6:,.0f} MB free): {reason}"
        raise OSError(message) from error


def _remove_old(out: Path, keep: int) -> None:
    """Removes all but the newest checkpoints."""
    for old in checkpoints(out)[:-keep]:
        # Renamed first, so that an interrupted removal leaves nothing that looks complete.
        # What can't be removed now is removed at the next start.
        with contextlib.suppress(OSError):
            shutil.rmtree(old.rename(old.with_name(f"{UNFINISHED}{old.name}")))


def _publish(checkpoint: Path, out: Path) -> None:
    """Makes a checkpoint's model the run's: first the config, which never changes in a run."""
    for file in sorted(checkpoint.iterdir()):
        if file.name not in (OPTIMIZER, STATE):
            link_or_copy(file, out / file.name)


def load_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    try:
        step = json.loads(regular(checkpoint / STATE).read_text())["step"]
        check_whole_number("its step", step, 0)
        return int(step)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SettingsError(f"{checkpoint} is not a complete checkpoint: {error}") from None


def load_optimizer(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, group: Group
) -> None:
    """Loads the optimiser of a wrapped model from a checkpoint.

    Raises:
        SettingsError: the file is missing, broken, or of another model.
    """
    try:
        with utf_8_path(regular(checkpoint / OPTIMIZER)) as path:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # Copied, or the optimiser would keep the file mapped, which then can't be removed.
        state = copy.deepcopy(state)
        options = StateDictOptions(full_state_dict=group.sharded)
        set_optimizer_state_dict(model, optimizer, state, options=options)
    except (MemoryError, torch.OutOfMemoryError):
        raise  # it says nothing of the file
    except Exception as error:  # of any kind: a pickle decides what is called with what
        reason = " ".join(str(error).split())
        raise SettingsError(f"{checkpoint / OPTIMIZER} can't be loaded: {reason}") from None


def read_run(out: Path) -> dict[str, Any] | None:
    """The run.json of an earlier start, or None."""
    path = out / RUN
    if not path.exists():
        return None
    try:
        run: dict[str, Any] = json.loads(regular(path).read_text(encoding="utf-8"))
        check_config(run["config"])
        Settings(**run["settings"])
        if not isinstance(run["start"], (str, type(None))):
            raise ValueError(f"start {run['start']!r} is not a name")
        if not all(isinstance(run[name], str) for name in ("tokens", "digest")):
            raise ValueError("tokens and digest are not text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SettingsError(f"{path} is broken: {error}") from None
    return run


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Creates a run's folder and locks it for this process.

    Raises:
        SettingsError: another process is training there.
    """
    (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(only_writer(out / CHECKPOINTS, wait=False))
        except BlockingIOError:
            raise SettingsError(f"another process is training in {out}") from None
        yield


def write_run(out: Path, run: dict[str, Any]) -> None:
    """Writes run.json, after repairing what killed processes left in the folder."""
    for folder in (out, out / CHECKPOINTS):
        clear_unfinished(folder)
    for newest in checkpoints(out)[-1:]:
        _publish(newest, out)
    _remove_old(out, run["settings"]["keep"])
    with whole_file(out / RUN) as file:
        file.write(json.dumps(run, indent=1).encode())


def _full_tensors(model: GPTModel, group: Group) -> dict[str, Tensor] | None:
    """A sharded model's tensors, gathered on rank 0; None if the model is not sharded."""
    if not group.sharded:
        return None
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = gathered(parameter.detach())  # on every process
        if group.rank == 0:
            tensors[name] = tensor.cpu()
    return tensors
