"""Ranks in threads of one process, which exchange tensors through memory."""

import threading
from collections.abc import Callable

import torch

from pgolf.ranks import Ranks


class Group:
    """Threads that stand for ranks: each hands in a tensor and reads those of all."""

    def __init__(self, world: int):
        self.world, self.barrier = world, threading.Barrier(world, timeout=60)
        self.handed: dict[int, torch.Tensor] = {}

    def exchange(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.handed[rank] = tensor.clone()
        self.barrier.wait()
        tensors = [self.handed[r] for r in range(self.world)]
        self.barrier.wait()
        return tensors


class Together(Ranks):
    """One of them."""

    group: Group

    def reduce_scatter(self, whole: torch.Tensor) -> torch.Tensor:
        return sum(self.group.exchange(self.rank, whole))[self.part(whole.numel())]

    def all_gather(self, whole: torch.Tensor) -> None:
        own = whole[self.part(whole.numel())]
        whole.copy_(torch.cat(self.group.exchange(self.rank, own)))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        tensor.copy_(sum(self.group.exchange(self.rank, tensor)))


def on_ranks(world: int, work: Callable[[Ranks], object]) -> list:
    """What `work` gives on each."""
    group, results, errors = Group(world), [None] * world, []

    def run(rank: int) -> None:
        ranks = Together(rank, world, torch.device("cpu"))
        object.__setattr__(ranks, "group", group)
        try:
            results[rank] = work(ranks)
        except Exception as e:
            errors.append(e)
            group.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        broken = threading.BrokenBarrierError  # what the others see then
        raise next((e for e in errors if not isinstance(e, broken)), errors[0])
    return results
