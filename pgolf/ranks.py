"""The processes of a run: torchrun's environment, and the few collectives that are needed."""

import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pgolf.device import pick_device
from pgolf.errors import LostRank, PgolfError, TrainingError
from pgolf.roll_call import RollCall
from pgolf.stop import handled

T = TypeVar("T")
# Rank 0 packs while the others wait: minutes for a large model, a slow codec and pruning.
TIMEOUT = timedelta(minutes=30)
# torch < 2.14 has them under the second name alone.
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
END = 20  # seconds until a process ends that lost the others, whatever holds it


def named(ranks: Sequence[int]) -> str:
    """'rank 1' or 'ranks 1, 2'."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run.

    Attributes:
        control: the group in which processes exchange the host's numbers, by gloo: decisions
            between steps must not wait for a GPU. None: the group of the tensors.
        roll_call: who is missing; None in a run of one process.
    """

    rank: int
    world: int
    device: torch.device
    control: Any = None
    roll_call: RollCall | None = None

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
        control = roll_call = None
        if world > 1:
            on_gpu = picked.type == "cuda"
            # Nothing that Python could handle reaches the wait for a rank that does not come.
            with handled(signal.SIG_DFL):
                if not dist.is_initialized():
                    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
                if on_gpu:
                    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
            roll_call = RollCall(dist.distributed_c10d._get_default_store(), rank, world)
        return cls(rank, world, picked, control, roll_call)

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
            PgolfError: what `work` raised, on every rank, so that none waits for one that is gone;
                an error of another class is a TrainingError on the others.
        """
        result, failure = None, None
        if self.first:
            try:
                result = work()
            except Exception as e:
                failure = e
        shared = failure
        if failure is not None and not isinstance(failure, PgolfError):
            shared = TrainingError(f"rank 0 failed: {type(failure).__name__}: {failure}")
        shared = self.broadcast_object(shared)
        if shared is None:
            return result
        shared.quiet = not self.first
        raise failure or shared

    def broadcast_object(self, value: T) -> T:
        """Rank 0's, on every rank; it is pickled."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, self.control)
        return values[0]

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """As many numbers of every rank, in the order of ranks, in float64."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.world == 1:
            return [mine.tolist()]
        every = [torch.zeros_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine, self.control)
        return [t.tolist() for t in every]

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sum numbers over ranks in float64."""
        return [math.fsum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def decide(self, *values: float) -> list[float]:
        """Rank 0's numbers, on every rank: clocks differ between processes."""
        return self.gather(values)[0]

    @contextmanager
    def patient(
        self, step: int, seconds: float = TIMEOUT.total_seconds(), phase: str = ""
    ) -> Iterator[None]:
        """A part of a run in which no rank may keep the others waiting for longer than this.

        Args:
            step: that it works on.
            phase: what else it does there, for messages.

        Raises:
            LostRank: one did, or is gone.
        """
        call = self.roll_call
        if call is None:
            yield
            return
        call.step, call.phase = step, phase
        # torch < 2.12 has it under the second name alone.
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_timeout(timedelta(seconds=seconds), self.control)
        try:
            yield
        except RuntimeError as e:  # gloo has no class of its own
            if not isinstance(e, dist.DistError) and "gloo" not in str(e):
                raise
            raise self.lost(f"{seconds:g} s" if "imed out" in str(e) else "") from None
        else:
            set_timeout(TIMEOUT, self.control)

    def lost(self, waited: str = "") -> LostRank:
        """The error that ends this rank because another one has ended or does not answer.

        Args:
            waited: how long this rank waited; '': the other one is gone.
        """
        signal.alarm(END)  # a GPU that waits for the others would hold the process
        ended, message, *_ = self.roll_call.first_failure() or self._missing(waited)
        speaker = next((r for r in range(self.world) if r not in ended), 0)
        return LostRank(message, self.rank != speaker, ended)

    def _missing(self, waited: str) -> tuple[list[int], str]:
        """(ranks that cannot report themselves, the message about them)."""
        missing, silent = self.roll_call.missing()
        what = f"did not answer for {waited}" if waited else "ended without a word: killed?"
        if missing and not silent:
            what = f"kept the others waiting{f' for {waited}' if waited else ''}"
        who = named(missing) if missing else "another rank"
        return missing, f"{self.roll_call.place}: {who} {what}"

    def broadcast(self, params: Iterable[nn.Parameter]) -> None:
        """Rank 0's weights, on every rank: another CPU may draw others from the same seed."""
        if self.world > 1:
            for p in params:
                dist.broadcast(p.detach(), 0)

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """The sum over ranks of this one's part of `whole`, which has one a rank."""
        if self.world == 1:
            return whole
        own = whole.new_empty(whole.numel() // self.world)
        _REDUCE_SCATTER(own, whole)
        return own

    def all_gather(self, whole: Tensor) -> None:
        """Fill in the parts of other ranks; this one's is there."""
        if self.world > 1:
            _ALL_GATHER(whole, whole[self.part(whole.numel())])

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over ranks in place."""
        if self.world > 1:
            dist.all_reduce(tensor)


ALONE = Ranks(0, 1, torch.device("cpu"))  # one process, for what asks for nothing but its number
