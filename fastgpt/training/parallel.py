"""The processes of a run: this one's rank, how they share the model, how they communicate."""

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
from fastgpt.training.settings import SettingsError, pick_device
from fastgpt.training.tokens import TextError


class PeersLost(RuntimeError):
    """Another process of the run died or no longer answers."""


class FailedOnRank0(SettingsError):
    """Rank 0 has failed, and reports the error itself."""


class LossOf(nn.Module):
    """A model whose forward is its loss, so that DDP can wrap it."""

    def __init__(self, model: GPTModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(idx, targets)


@dataclass
class Group:
    """The processes of a run, seen from this one; a single process is a group of one."""

    rank: int
    size: int
    device: torch.device
    sharded: bool  # by FSDP2; else every process has the whole model
    store: Any = None  # torch's key-value store, if there are several processes
    answers: int = 0  # how often on_rank0 was called

    def share(self, batch: int) -> int:
        """This process's windows of a batch.

        Raises:
            SettingsError: the batch can't be divided evenly.
        """
        if batch % self.size:
            raise SettingsError(
                f"a batch of {batch} can't be divided evenly among {self.size} processes"
            )
        return batch // self.size

    def wrap(self, model: GPTModel) -> Callable[[Tensor, Tensor], Tensor]:
        """The model's loss, whose backward averages gradients; FSDP shards the model in place."""
        if self.size > 1 and not self.sharded:
            return nn.parallel.DistributedDataParallel(LossOf(model), gradient_as_bucket_view=True)
        if self.sharded:
            try:
                from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
            except ImportError:
                raise SettingsError("--fsdp needs PyTorch 2.6 or newer") from None
            mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.size,))
            for module in [*model.trf_blocks, model]:
                fully_shard(module, mesh=mesh)
            register_fsdp_forward_method(model, "loss")
        return model.loss

    @contextlib.contextmanager
    def accumulating(self, model: GPTModel, loss_of: Any, last: bool) -> Iterator[None]:
        """Lets only the last backward of a step exchange gradients."""
        if self.sharded:
            sharded: Any = model
            sharded.set_requires_gradient_sync(last)
        quiet = self.size > 1 and not self.sharded and not last
        with loss_of.no_sync() if quiet else contextlib.nullcontext():
            yield

    def reshard(self, model: GPTModel) -> None:
        """Frees gathered weights, which FSDP keeps after a forward pass without a backward."""
        if self.sharded:
            sharded: Any = model
            sharded.reshard()

    def sum(self, *numbers: Tensor | float) -> Tensor:
        """Each number summed over the processes, [n] float32 on the group's device."""
        total = torch.empty(len(numbers), device=self.device)
        for place, number in zip(total, numbers, strict=True):
            # A number is filled in: as a tensor of the host's it would be waited for.
            if isinstance(number, Tensor):
                place.copy_(number.detach())
            else:
                place.fill_(number)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def on_rank0(self, work: Callable[[], Any]) -> Any:
        """Runs work on rank 0 and returns its result, which must fit into JSON, on all ranks.

        The others wait for as long as it takes.

        Raises:
            FailedOnRank0: on the other ranks, if work fails on rank 0.
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
                self._wait_for_readers(key)
                raise
            self.store.set(key, json.dumps({"answer": answer}))
            return answer
        while not self.store.check([key]):
            time.sleep(0.05)
        said = json.loads(self.store.get(key))
        if "error" in said:
            self.store.add(f"{key} heard", 1)
            raise FailedOnRank0(said["error"])
        return said["answer"]

    def _wait_for_readers(self, key: str, limit: float = 10.0) -> None:
        """Waits until the others have read an answer: the store ends with rank 0."""
        end = time.monotonic() + limit
        while self.store.add(f"{key} heard", 0) < self.size - 1 and time.monotonic() < end:
            time.sleep(0.05)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor, gathered if it is sharded; all processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def join(device: str = "auto", fsdp: bool = False, timeout: float = 600) -> Iterator[Group]:
    """The group that torchrun's environment variables describe, or this process alone.

    Args:
        device: cpu, cuda, mps, or auto for the best available.
        fsdp: shard weights, gradients and optimiser with FSDP2 instead of replicating with DDP.
        timeout: seconds without an answer after which other processes count as lost.

    Raises:
        SettingsError: the device is not available, or fsdp is set for a single process.
        PeersLost: other processes can't be reached, or were lost during the run.
    """
    rank, size = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))
    chosen = pick_device(device)
    if size <= 1:
        if fsdp:
            raise SettingsError("--fsdp needs several processes: start them with torchrun")
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
    """Turns errors of the communication between processes into PeersLost."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not isinstance(error, dist.DistError) and "gloo" not in said.lower():
            raise
        # Of "[/its/source.cc:537] What happened. Advice." a user needs the middle.
        reason = re.sub(r"^\[\S+\] ", "", said.partition("\n")[0]).partition(". ")[0]
        raise PeersLost(f"process {rank} lost contact with the others: {reason}") from error
