"""The processes of a run: torchrun's environment, and the few collectives that are needed."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from pgolf.device import pick_device
from pgolf.errors import PgolfError

T = TypeVar("T")
# Rank 0 packs while the others wait: minutes for a large model, a slow codec and pruning.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    @classmethod
    def start(cls, device: str) -> "Ranks":
        """Join the process group that torchrun describes, if any (NCCL on GPUs, gloo on CPU)."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        rank = int(os.environ.get("RANK", 0))
        picked = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
        if picked.type == "cuda":
            torch.cuda.set_device(picked)
        if world > 1 and not dist.is_initialized():
            dist.init_process_group(
                "nccl" if picked.type == "cuda" else "gloo", timeout=TIMEOUT
            )
        return cls(rank, world, picked)

    def part(self, count: int) -> slice:
        """This rank's run of `count` things in a row, as many as every other's, or one more."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def stop(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def on_first(self, work: Callable[[], T]) -> T | None:
        """Do something on rank 0 while the others wait; its result there, None elsewhere.

        Raises:
            PgolfError: what `work` raised, on every rank, so that none waits for one that is gone.
        """
        result, failure = None, [None]
        if self.first:
            try:
                result = work()
            except PgolfError as e:
                failure = [e]
        if self.world > 1:
            dist.broadcast_object_list(failure, 0, device=self.device)
        if failure[0] is not None:
            raise failure[0]
        return result

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sum numbers over ranks in float64."""
        t = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(t)
        return t.tolist()

    def decide(self, *values: float) -> list[float]:
        """Rank 0's numbers, on every rank: clocks and signals differ between processes."""
        if self.world == 1:
            return list(values)
        t = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(t, 0)
        return t.tolist()

    def broadcast(self, params: Iterable[nn.Parameter]) -> None:
        """Rank 0's weights, on every rank: another CPU may draw others from the same seed."""
        if self.world > 1:
            for p in params:
                dist.broadcast(p.detach(), 0)

    def average_gradients(self, params: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over ranks: one all-reduce of one fp32 buffer."""
        if self.world == 1:
            return
        grads = [p.grad for p in params if p.grad is not None]
        flat = torch.cat([g.reshape(-1).float() for g in grads])
        dist.all_reduce(flat)
        flat /= self.world
        for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(mean.view_as(g))


ALONE = Ranks(0, 1, torch.device("cpu"))  # one process, for what asks for nothing but its number
