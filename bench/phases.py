"""Where the steps of a trainer spend their time: forward, backward, optimiser; and their memory."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pgolf.training.trainer import Trainer


class Mark(NamedTuple):
    """The moment at which a phase begins, on the host and, if there is a GPU, on its stream."""

    phase: str
    host: float
    event: torch.cuda.Event | None


class Phases:
    """Marks in the steps of a trainer, from now on.

    Phases are `forward`, `backward`, `optimizer` and `batch`, what comes before the first pass. A
    backward lasts until the next forward or the optimiser begins: it has the loading of a further
    pass's tokens in it. The optimiser's phase has all that ends a step: what ranks exchange, and
    the casts of the weights.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.steps = trainer, []
        self._on_gpu = trainer.ranks.device.type == "cuda"
        trainer.forward = self._marking("forward", trainer.forward, "backward")
        trainer.update = self._marking("optimizer", trainer.update, "end")

    def step(self) -> Any:
        """A step that changes no weight, and its marks."""
        self.steps.append([])
        self._mark("batch")
        return self.trainer.step(0.0, self.trainer.config.optim.momentum)

    def _mark(self, phase: str) -> None:
        event = None
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        if self.steps:
            self.steps[-1].append(Mark(phase, time.perf_counter(), event))

    def _marking(self, phase: str, function: Callable, then: str) -> Callable:
        def call(*args: Any, **named: Any) -> Any:
            self._mark(phase)
            result = function(*args, **named)
            self._mark(then)
            return result

        return call

    def medians(self, last: int) -> dict[str, dict[str, float | None]]:
        """Phase -> its 'host_ms' and 'gpu_ms' (None without a GPU), over the last steps."""
        host, gpu = defaultdict(list), defaultdict(list)
        if self._on_gpu:
            torch.cuda.synchronize()
        for marks in self.steps[-last:]:
            spent = defaultdict(float), defaultdict(float)
            for mark, following in zip(marks, marks[1:], strict=False):
                spent[0][mark.phase] += 1e3 * (following.host - mark.host)
                if self._on_gpu:
                    spent[1][mark.phase] += mark.event.elapsed_time(following.event)
            for times, step in zip((host, gpu), spent, strict=True):
                for phase, milliseconds in step.items():
                    times[phase].append(milliseconds)
        return {
            phase: {
                "host_ms": statistics.median(times),
                "gpu_ms": statistics.median(gpu[phase]) if self._on_gpu else None,
            }
            for phase, times in host.items()
        }

    def peak_bytes(self) -> int | None:
        """Bytes that a step takes at its peak beyond what stays between steps; None on a CPU."""
        if not self._on_gpu:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
