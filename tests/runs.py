"""The command in processes of its own, and a text and a model so small that a step is nothing."""

import contextlib
import csv
import json
import multiprocessing
import os
import random
import socket
import sys
import time

import pytest
import torch

from fastgpt import cli
from fastgpt.tokenizer import EncodingError, gpt2_encoding

CONFIG = {
    "vocab_size": 256,  # of GPT-2's tokens, those of one byte
    "context_length": 16,
    "emb_dim": 32,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": False,
}
# Processes forked from one that has all imported: they start in no time.
PROCESSES = multiprocessing.get_context("forkserver") if os.name != "nt" else None
if PROCESSES is not None:
    # The last two are imported by FSDP and by the first optimiser.
    modules = ["fastgpt.cli", "fastgpt.training.run_setup", "matplotlib.figure"]
    PROCESSES.set_forkserver_preload([*modules, "torch.distributed.fsdp", "torch._dynamo"])


def write_inputs(folder, letters=3000, **changes):
    """text.txt, in letters that are a token each, and config.json."""
    draw = random.Random(0)
    text = "".join(draw.choice("abcdefgh") + "\n" for _ in range(letters))
    (folder / "text.txt").write_text(text)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def needs_table():
    try:
        return gpt2_encoding()
    except EncodingError as error:
        pytest.skip(f"no table of tokens here: {error}")


def train_arguments(folder, out, *more):
    common = ["--config", folder / "config.json", "--batch", "6", "--eval-every", "4"]
    return [str(a) for a in ("train", folder / "text.txt", "--out", out, *common, *more)]


def _command(arguments, environment, output, before):
    os.environ.update(environment)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if before is not None:
        before()
    code = cli.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Run:
    """The command's processes, one or several that know of each other."""

    def __init__(self, folder, arguments, size=1, before=None):
        if PROCESSES is None:
            pytest.skip("processes don't fork here")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.outputs = [folder / f"output-{port}-{rank}" for rank in range(size)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = PROCESSES.Process(
                target=_command,
                args=(arguments, environment if size > 1 else {}, output, before),
                daemon=True,
            )
            process.start()
            self.processes.append(process)

    def codes(self, timeout=120):
        """Exit codes, once all have ended; one that doesn't is killed, and fails the test."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        alive = [process for process in self.processes if process.is_alive()]
        for process in alive:
            process.kill()
        assert not alive, f"the run hangs:\n{self.said()}"
        return [process.exitcode for process in self.processes]

    def said(self):
        return "\n".join(path.read_text() for path in self.outputs if path.exists())

    def wait_for(self, happened, timeout=60):
        end = time.monotonic() + timeout
        while not happened():
            assert self.processes[0].is_alive(), self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.005)


def trained(folder, out, *more, size=1):
    """Trains to the end; the run's losses."""
    run = Run(folder, train_arguments(folder, out, *more), size)
    assert run.codes() == [0] * size, run.said()
    return losses(out)


def losses(out):
    """Each step's loss and validation loss."""
    with (out / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [(float(row["loss"]), float(row["validation_loss"] or "nan")) for row in rows]


def steps_done(out):
    with contextlib.suppress(OSError):
        return max(0, (out / "log.csv").read_text().count("\n") - 1)
    return 0
