"""One process or several: who this one is, how the model is shared out, what all agree on."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgpt.model.gpt import GPTModel
from fastgpt.training.device import pick_device
from fastgpt.training.settings import SettingsError
from fastgpt.training.tokens import TextError


class PeersLost(RuntimeError):
    """Another process of the run died or answers no more."""


class SaidElsewhere(SettingsError):
    """The first process has failed, and says so."""


class LossOf(nn.Module):
    """A model whose call is its loss: what DDP can wrap."""

    def __init__(self, model: GPTModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(idx, targets)


@dataclass
class Group:
    """The processes of a run, seen from this one; a single process is a group too."""

    rank: int
    size: int
    device: torch.device
    sharded: bool  # by FSDP2; else every process has the whole model
    store: Any = None  # torch's, where there are several processes
    answers: int = 0

    def wrap(self, model: GPTModel) -> Callable[[Tensor, Tensor], Tensor]:
        """The model's loss such that its backward shares gradients; shards the model in place."""
        if self.size > 1 and not self.sharded:
            return nn.parallel.DistributedDataParallel(LossOf(model), gradient_as_bucket_view=True)
        if self.sharded:
            try:
                from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
            except ImportError:
                raise SettingsError("--fsdp takes PyTorch 2.6 or newer") from None
            mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.size,))
            for module in [*model.trf_blocks, model]:
                fully_shard(module, mesh=mesh)
            register_fsdp_forward_method(model, "loss")
        return model.loss

    @contextlib.contextmanager
    def accumulating(self, model: GPTModel, loss_of: Any, last: bool) -> Iterator[None]:
        """Gradients are shared among the processes by the last backward of a step only."""
        if self.sharded:
            sharded: Any = model
            sharded.set_requires_gradient_sync(last)
        quiet = self.size > 1 and not self.sharded and not last
        with loss_of.no_sync() if quiet else contextlib.nullcontext():
            yield

    def reshard(self, model: GPTModel) -> None:
        """Back to shards after a pass without a backward, which leaves the outermost gathered."""
        if self.sharded:
            sharded: Any = model
            sharded.reshard()

    def sum(self, *numbers: Tensor | float) -> list[float]:
        """Each number summed over the processes."""
        total = torch.stack(
            [torch.as_tensor(n, dtype=torch.float32, device=self.device).detach() for n in numbers]
        )
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def first(self, work: Callable[[], Any]) -> Any:
        """What work, done by the first process alone, returns, as JSON has it; the others wait
        for as long as it takes, and fail with SaidElsewhere if it fails.
        """
        if self.size == 1:
            return work()
        self.answers += 1
        key = f"answer {self.answers}"
        if self.rank == 0:
            try:
                answer = work()
            except Exception as error:
                self.store.set(key, json.dumps({"error": str(error)}))
                self._heard(key)
                raise
            self.store.set(key, json.dumps({"answer": answer}))
            return answer
        while not self.store.check([key]):
            time.sleep(0.05)
        said = json.loads(self.store.get(key))
        if "error" in said:
            self.store.add(f"{key} heard", 1)
            raise SaidElsewhere(said["error"])
        return said["answer"]

    def _heard(self, key: str, limit: float = 10.0) -> None:
        """Waits for the others to have read it: the first process's end is the store's."""
        end = time.monotonic() + limit
        while self.store.add(f"{key} heard", 0) < self.size - 1 and time.monotonic() < end:
            time.sleep(0.05)


def whole(parameter: Tensor) -> Tensor:
    """A parameter, gathered from its shards; all processes must ask at once."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@contextlib.contextmanager
def join(device: str = "auto", fsdp: bool = False, timeout: float = 600) -> Iterator[Group]:
    """The group that torchrun's environment names, or this process alone.

    Args:
        device: cpu, cuda, mps or auto: the best there is.
        fsdp: shard weights, gradients and optimiser with FSDP2 instead of copying them with DDP.
        timeout: seconds without an answer after which the other processes are given up.

    Raises:
        SettingsError: the device is not to be had, or fsdp is asked of a single process.
        PeersLost: the others can't be reached, or were lost on the way.
    """
    rank, size = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))
    chosen = pick_device(device)
    if size <= 1:
        if fsdp:
            raise SettingsError("--fsdp shards a model among processes: start them with torchrun")
        yield Group(0, 1, chosen, False)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    limit = datetime.timedelta(seconds=timeout)
    with _losing_peers(rank):
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=limit))
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        ours = dist.PrefixStore("fastgpt", store)
        dist.init_process_group(backend, store=ours, rank=rank, world_size=size, timeout=limit)
        try:
            yield Group(rank, size, chosen, fsdp, dist.PrefixStore("answers", store))
        except (TextError, SettingsError):
            dist.destroy_process_group()
            raise
        dist.destroy_process_group()


@contextlib.contextmanager
def _losing_peers(rank: int) -> Iterator[None]:
    """Errors of the transport between processes become PeersLost."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not isinstance(error, dist.DistError) and "gloo" not in said.lower():
            raise
        # "[/its/source.cc:537] What happened. Advice." says more than a user can use.
        reason = re.sub(r"^\[\S+\] ", "", said.partition("\n")[0]).partition(". ")[0]
        raise PeersLost(f"process {rank} lost another one of the run: {reason}") from error
