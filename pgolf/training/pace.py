"""The steps that are on their way: a host that stays ahead of the GPU and still knows the time.

A host that waits for each step leaves the GPU idle for as long as the next one takes to queue. So
it goes on: a step leaves its loss and gradient norms in page-locked memory with an event behind it,
and they are read once `RUN_AHEAD` more steps are queued, when they have long been there. On a CPU
a step is over when its call returns: none is ahead, nothing depends on time but a time budget.
"""

import gc
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgolf.optim.schedule import Clock

RUN_AHEAD = 2  # more steps than this hide nothing more
# With less time than so many mean steps left, the host waits for each one: the budget holds.
LAST_STEPS = 8


@contextmanager
def frozen_objects() -> Iterator[None]:
    """A block in which collections of garbage pass over all that is there before it.

    With torch loaded that is much, and all ranks wait for the one that looks at it.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(frozen=True)
class Step:
    """A step of training.

    Attributes:
        clock: after it; until the step is over, its seconds are an estimate.
        lr_scale, momentum: that it took.
        loss, norm, own_norm: what it found; NaN until it is over. The loss and the last norm are of
            this rank alone.
    """

    clock: Clock
    lr_scale: float
    momentum: float
    loss: float = math.nan
    norm: float = math.nan
    own_norm: float = math.nan


class Pace:
    """The training clock, and the steps that are not known to be over.

    Args:
        device: what runs the steps.
        clock: what was spent before.
    """

    def __init__(self, device: torch.device, clock: Clock):
        self.done = replace(clock)  # after the last step that is known to be over
        self._on_gpu = device.type == "cuda"
        self._started = time.perf_counter() - clock.seconds
        self._queue: deque[tuple[Step, Tensor, torch.cuda.Event | None]] = deque()
        # A slot is written again only after it was read: one more than may be on their way.
        self._slots = torch.zeros(RUN_AHEAD + 1, 3, pin_memory=self._on_gpu)
        self._pushed = 0
        self._logged, self._waited = self.done, 0.0

    def __len__(self) -> int:
        return len(self._queue)

    def ahead(self, seconds_left: float, step_seconds: float) -> int:
        """How many steps may be on their way when the host goes on.

        Args:
            seconds_left: of the budget; infinite without one.
            step_seconds: of a step, as far as is known.
        """
        return RUN_AHEAD if self._on_gpu and seconds_left > LAST_STEPS * step_seconds else 0

    def seconds_after(self, step: int) -> float:
        """When that step is over, if steps go on to take as long as they did."""
        mean = self.done.seconds / self.done.step if self.done.step else 0.0
        return self.done.seconds + mean * (step - self.done.step)

    def push(self, step: Step, *found: Tensor) -> None:
        """Take in a step whose work is queued on the current stream, with loss and norms (0-d)."""
        slot, event = self._slots[self._pushed % len(self._slots)], None
        slot.copy_(torch.stack(found), non_blocking=True)
        if self._on_gpu:
            event = torch.cuda.Event()
            event.record()
        self._pushed += 1
        self._queue.append((step, slot, event))

    def pull(self) -> Step:
        """The oldest one, once it is over; its seconds are this process's."""
        step, slot, event = self._queue.popleft()
        began = time.perf_counter()
        if event is not None:
            event.synchronize()
        loss, norm, own_norm = slot.tolist()
        now = time.perf_counter()
        self._waited += now - began
        clock = replace(step.clock, seconds=now - self._started)
        return replace(step, clock=clock, loss=loss, norm=norm, own_norm=own_norm)

    def since_logged(self, clock: Clock) -> dict[str, float]:
        """What a line of metrics says of the steps since the last one.

        Args:
            clock: after the step that is logged.

        Returns:
            tokens_per_second, of all ranks; wait_ms, in which the host waited for the GPU; memory,
            the most bytes that torch held of this GPU so far, where there is one, graphs' too.
        """
        tokens, seconds = clock.tokens - self._logged.tokens, clock.seconds - self._logged.seconds
        row = {"tokens_per_second": tokens / max(seconds, 1e-9), "wait_ms": 1000 * self._waited}
        if self._on_gpu:
            row["memory"] = torch.cuda.max_memory_reserved()
        self._logged, self._waited = clock, 0.0
        return row

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """A block that is off the clock if no step is on its way, and otherwise beside the work."""
        began, idle = time.perf_counter(), not self._queue
        yield
        if idle:
            self._started += time.perf_counter() - began
