"""Learning rate, momentum, averaging and QAT as functions of how much of the run is spent.

`share` is the spent part of the time, token or step budget, whichever is furthest: a recipe written
in shares behaves alike on one GPU, eight, or a CPU. schedule=iterations is the published form: a
warm-down of so many steps at the mean step time, momentum and averaging by step.
"""

import math
from dataclasses import dataclass

from pgolf.config import Config


@dataclass
class Clock:
    """What a run has spent so far."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Schedule:
    """Answers every 'how much, now?' of the trainer; holds no state."""

    def __init__(self, config: Config):
        self.config = config
        self.s = config.schedule
        self.by_share = self.s.schedule == "share"
        steps = [self.s.max_steps] if self.s.max_steps else []
        if self.s.max_tokens:
            steps.append(math.ceil(self.s.max_tokens / config.data.batch_tokens))
        self.max_steps = min(steps) if steps else 0
        # What is kept for calibration and quantisation is not there for training.
        self.max_seconds = self.s.max_seconds - self.s.reserve_s if self.s.max_seconds else 0.0

    def share(self, clock: Clock) -> float:
        """Spent part of the run, 0 to 1."""
        spent = clock.step / self.max_steps if self.max_steps else 0.0
        if self.max_seconds:
            spent = max(spent, clock.seconds / self.max_seconds)
        return min(spent, 1.0)

    def finished(self, clock: Clock) -> bool:
        """Whether the budget allows no further step of mean length."""
        if self.max_steps and clock.step >= self.max_steps:
            return True
        mean = clock.seconds / clock.step if clock.step else 0.0
        return bool(self.max_seconds) and clock.seconds + mean > self.max_seconds

    def steps_left(self, clock: Clock) -> int:
        """Estimate for progress bars."""
        left = []
        if self.max_steps:
            left.append(self.max_steps - clock.step)
        if self.max_seconds and clock.seconds:
            left.append(int((self.max_seconds - clock.seconds) * clock.step / clock.seconds))
        return max(min(left), 0) if left else 0

    def warmdown(self, clock: Clock) -> float:
        """Warm-down multiplier m in [0, 1]: 1, then linearly to 0."""
        if self.by_share:
            tail = self.s.warmdown
            return min(1.0, (1.0 - self.share(clock)) / tail) if tail else 1.0
        if self.max_seconds:
            mean = clock.seconds / clock.step if clock.step else 0.0
            tail, left = self.s.warmdown_iters * mean, self.max_seconds - clock.seconds
        else:
            tail, left = float(self.s.warmdown_iters), float(self.max_steps - clock.step)
        return max(left, 0.0) / tail if left <= tail and tail > 0 else 1.0

    def lr_scale(self, clock: Clock) -> float:
        """Factor of every learning rate at this step."""
        floor = self.s.lr_floor
        scale = floor + (1.0 - floor) * self.warmdown(clock)
        return scale * (self.config.quant.qat_lr_scale if self.qat(clock) else 1.0)

    def momentum(self, clock: Clock) -> float:
        """Muon's momentum, rising linearly."""
        o = self.config.optim
        if self.by_share:
            warm = self.share(clock) / o.momentum_warmup if o.momentum_warmup else 1.0
        else:
            iters = self.s.momentum_warmup_iters
            warm = clock.step / iters if iters else 1.0
        return o.momentum_start + (o.momentum - o.momentum_start) * min(warm, 1.0)

    def qat(self, clock: Clock) -> bool:
        """Whether fake-quant is on."""
        q = self.config.quant
        if q.qat_start >= 1.0:
            return False
        if self.by_share:
            return self.share(clock) >= q.qat_start
        return self.warmdown(clock) < q.qat_start_lr

    def ema_decay(self, before: Clock, after: Clock) -> float | None:
        """Decay of the EMA over one step; None: not averaging yet; 0: start from these weights."""
        a = self.config.average
        if not self.by_share:
            return a.ema_decay
        if self.share(after) < a.ema_start:
            return None
        if self.share(before) < a.ema_start:
            return 0.0
        return math.exp(-(self.share(after) - self.share(before)) / a.ema_horizon)

    def swa_snapshot(self, before: Clock, after: Clock) -> bool:
        """Whether the weights after this step are an SWA snapshot."""
        a = self.config.average
        if not self.by_share:
            return self.warmdown(before) < a.swa_start_lr and after.step % a.swa_every_iters == 0
        if self.share(after) < a.swa_start:
            return False

        def count(clock: Clock) -> int:
            # (0.85 - 0.8) / 0.05 is just below 1 in floating point
            return math.floor((self.share(clock) - a.swa_start) / a.swa_every + 1e-9)

        return self.share(before) < a.swa_start or count(after) > count(before)
