"""The training loop: micro-steps, one optimiser step, and what happens between steps.

Off the clock: compilation, validation and checkpoints of it. On the clock: everything else.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pgolf.data.loader import Loader
from pgolf.errors import StorageError, TrainingError
from pgolf.model import GPT
from pgolf.ops.compile import compile_graph
from pgolf.ops.tensors import compute_dtype
from pgolf.optim.averaging import Averager
from pgolf.optim.exchange import Exchange
from pgolf.optim.groups import Optimizers, fuses, local_limit
from pgolf.optim.schedule import Clock, Schedule
from pgolf.progress import format_seconds
from pgolf.scoring.bpb import ByteTable
from pgolf.scoring.windows import Sums, evaluate
from pgolf.training.estimate import time_line
from pgolf.training.interrupt import Interrupt
from pgolf.training.late_qat import LateQat
from pgolf.training.pace import Pace, Step
from pgolf.training.passes import compiles, micro_steps, pass_limit
from pgolf.training.profile import Profile
from pgolf.training.session import Session
from pgolf.training.step_log import StepLog


class Trainer:
    """One run's state and its loop.

    Args:
        model: initialised, on the run's device.
        val: (N + 1,) validation tokens.
        ops: operator -> implementation, for the optimisers.
    """

    def __init__(
        self,
        session: Session,
        model: GPT,
        loader: Loader,
        val: np.ndarray,
        table: ByteTable,
        ops: Mapping[str, str],
    ):
        config, ranks = session.config, session.ranks
        self.session, self.say = session, session.say
        self.config, self.ranks, self.folder = config, ranks, session.folder
        self.model, self.loader, self.val, self.table = model, loader, val, table
        self.ops = ops
        self.schedule = Schedule(config)
        self.log = StepLog(session, self.schedule)
        self.clock = Clock()
        self.kept = 0  # the step of the last checkpoint that could be written
        d = config.data
        limit = pass_limit(config, ranks.device)
        self.accum = micro_steps(d.batch_tokens, limit, d.seq_len, ranks.world)
        self.local_tokens = d.batch_tokens // ranks.world // self.accum
        # What a pass's gradient starts from: what ranks and passes add up is a mean, at no launch.
        dtype, passes = compute_dtype(model.compute_dtype), self.accum * ranks.world
        self.share = torch.full((), 1 / passes, dtype=dtype, device=ranks.device)
        # Seconds of a step and of one of its passes, once warmed up; 0: not measured.
        self.step_seconds = self.pass_seconds = 0.0
        self.profile = Profile(session) if config.run.profile else None
        self.qat = LateQat(model, config, ranks.device)
        limit = local_limit(config.optim, ranks.world)
        self.exchange = Exchange(model, ranks, self.accum, ops, limit)
        self.averager = Averager(model, self.schedule, fuses(ops), self.exchange.held)
        self.optimizers = self._new_optimizers()
        self.compiled = compiles(config, ranks.device)
        self.forward = (
            compile_graph(model, model.ops, ranks.device) if self.compiled else model
        )

    def _new_optimizers(self) -> Optimizers:
        """Without a state."""
        return Optimizers(
            self.model, self.config.optim, self.ops, self.averager.averages, self.exchange.held,
            self.ranks.world,
        )  # fmt: skip

    # --- steps --------------------------------------------------------------------------------

    def step(
        self, lr_scale: float, momentum: float, average_rate: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward of all micro-steps, then one update: (mean loss, gradient norm)."""
        rates = lr_scale, momentum, average_rate
        total = self.passes(self.accum, self.optimizers.numbers(*rates))
        return total, self.update(*rates, self.loader.carried)

    def update(self, *rates: float | torch.Tensor) -> torch.Tensor:
        """What ends a step after its passes; the norm of its gradient."""
        grads, norm = self.exchange.reduce()
        self.optimizers.step(grads, norm, *rates)
        self.exchange.publish()
        return norm

    def passes(
        self,
        count: int,
        numbers: Sequence[float] = (),
        batch: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Forward and backward of `count` micro-steps; what they add to the mean loss.

        Args:
            numbers: that go to the device with the tokens.
            batch: that each takes; None: the loader's next ones.
        """
        self.model.check_published()
        total = torch.zeros((), device=self.ranks.device)
        for _ in range(count):
            x, y = batch or self.loader.next_batch(self.local_tokens, numbers)
            loss = self.forward(x, y)
            loss.backward(self.share)
            self.exchange.collect()
            total.add_(loss.detach(), alpha=1 / self.accum)
        return total

    def _expected(self) -> Clock:
        """The clock after the step that begins, if it takes as long as the mean step so far."""
        c = self.clock
        mean = c.seconds / c.step if c.step else 0.0
        tokens = c.tokens + self.config.data.batch_tokens
        return Clock(c.step + 1, tokens, c.seconds + mean)

    def warm_up(self) -> None:
        """Compile and measure off the clock: real steps, then everything is put back.

        Without torch.compile one pass and one update are enough.
        """
        weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        cursor = self.loader.state_dict()
        started = time.perf_counter()
        if self.compiled:
            self.say(f"compiling: {self.config.run.compile_warmup} steps off the clock ...")
            for n in range(self.config.run.compile_warmup):
                with self.session.phases("warm_up" if n else "compile"):
                    began = self._now()
                    self.step(0.0, self.config.optim.momentum_start)
                    self.step_seconds = self._now() - began
            self.pass_seconds = self.step_seconds / self.accum
        else:
            self.passes(1)
            passed = self._now()
            self.pass_seconds = passed - started
            self.update(0.0, self.config.optim.momentum_start)
            self.step_seconds = self.accum * self.pass_seconds + self._now() - passed
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(weights[name])
        self.exchange.publish()
        self.optimizers = self._new_optimizers()
        self.loader.load_state_dict(cursor)
        if self.compiled:
            self.say(f"compiled in {format_seconds(time.perf_counter() - started)}")

    def say_estimate(self) -> None:
        """What is left to do and how long it takes, as the warm-up measured it."""
        token = self.pass_seconds / self.local_tokens / self.ranks.world
        line = time_line(self.config, self.clock, len(self.val) - 1, self.step_seconds, token)
        self.say(f"  {'time':<15} {line}")

    def _now(self) -> float:
        self.synchronize()
        return time.perf_counter()

    def train(self, interrupt: Interrupt) -> None:
        """Run until the budget is spent.

        Raises:
            TrainingError: the loss is not finite, or another rank is gone.
            Interrupted: Ctrl-C or the like, on any rank; a checkpoint was written.
            StorageError: likewise, and it could not be.
        """
        # Others may have compiled for longer than they are waited for. And one measure is for all:
        # they have to agree on how many steps may be on their way.
        (self.step_seconds,) = self.ranks.decide(self.step_seconds)
        self.synchronize()
        if self.profile:
            self.profile.at(self.clock.step)
        pace = Pace(self.ranks.device, self.clock)
        patience = max(self.config.run.patience, 4 * self.step_seconds)
        while not self.schedule.finished(self.clock):
            before = replace(self.clock)
            with self.ranks.patient(self.clock.step + 1, patience):
                self._queue_step(pace, before)
                over, stop = self._collect(pace, interrupt)
            self.averager.update(before, self.clock)
            with pace.between_steps():
                for step in over:
                    if self._logs(step.clock):
                        self.log.step(step, pace.since_logged(step.clock))
                if not pace:
                    self._between_steps()
                if stop:
                    self._stop(interrupt, stop)
        if self.profile:
            self.profile.close(self.clock.step)
        stop = self._asked_to_stop(self.ranks.gather([interrupt.number]))
        if stop:  # while the last step was looked at
            self._stop(interrupt, stop)

    def _queue_step(self, pace: Pace, before: Clock) -> None:
        """Start a step and count it as done; its end is not waited for."""
        if self.schedule.qat(before) and not self.qat.on:
            self.exchange.gather_weights()
            self.qat.turn_on()
            self.exchange.publish()
            self.log.event(self.clock, f"late QAT on for {len(self.qat.plans)} matrices")
        lr_scale, momentum = self.schedule.lr_scale(before), self.schedule.momentum(before)
        # Before the step, which moves the EMA in the pass that updates the weights if it is
        # fused; `update` takes SWA's snapshots, and moves the EMA where it is not.
        average_rate = self.averager.ema_rate(before, self._expected())
        loss, norm = self.step(lr_scale, momentum, average_rate)
        self.clock.step += 1
        self.clock.tokens += self.config.data.batch_tokens
        self.clock.seconds = pace.seconds_after(self.clock.step)
        step = Step(replace(self.clock), lr_scale, momentum)
        pace.push(step, loss, norm, self.exchange.own_norm)

    def _collect(self, pace: Pace, interrupt: Interrupt) -> tuple[list[Step], int]:
        """Steps that are seen to be over, and the signal that asks for a stop, or 0.

        All that were queued, where the weights are looked at next or the time has to be known.
        Every rank is told the same, in the same step: rank 0's clock, and anyone's signal.

        Raises:
            TrainingError: the loss or its gradient was not finite, on any rank.
        """
        over: list[Step] = []
        stop = 0
        while len(pace) > (ahead := 0 if stop or any(self._due()) else self._ahead(pace)):
            if not ahead:  # a wait for a GPU, which may wait for a rank, knows no patience
                self.ranks.gather([0.0])
            step = pace.pull()
            told = self.ranks.gather(
                [step.clock.seconds, interrupt.number, step.loss, step.norm, step.own_norm]
            )
            pace.done = replace(step.clock, seconds=told[0][0])
            self.clock.seconds = pace.seconds_after(self.clock.step)
            self._check_finite(step.clock.step, [row[2:] for row in told])
            loss = sum(row[2] for row in told) / self.ranks.world
            over.append(replace(step, clock=pace.done, loss=loss))
            stop = stop or self._asked_to_stop([row[1:2] for row in told])
        return over, stop

    def _ahead(self, pace: Pace) -> int:
        limit = self.schedule.max_seconds
        mean = max(self.step_seconds, pace.seconds_after(1) - pace.seconds_after(0))
        return pace.ahead(limit - self.clock.seconds if limit else math.inf, mean)

    @staticmethod
    def _asked_to_stop(told: list[list[float]]) -> int:
        """The signal that came first in the order of ranks, 0 if none did."""
        return next((int(number) for (number,) in told if number), 0)

    def _stop(self, interrupt: Interrupt, number: int) -> None:
        """Keep this step, then raise Interrupted; StorageError if it could not be kept."""
        if self.kept != self.clock.step:
            self.checkpoint()
        if self.profile:  # which may take long
            self.profile.close(self.clock.step, stopped=True)
        if self.kept != self.clock.step:
            self.folder.check()
        error = interrupt.error(self.clock.step, number, self.kept == self.clock.step)
        error.quiet = not self.ranks.first
        raise error

    def _due(self) -> tuple[bool, bool, bool]:
        """Whether a validation, a checkpoint and an end of a trace are due after the last step."""
        every, keep = self.config.eval.val_every, self.config.run.checkpoint_every
        finished, step = self.schedule.finished(self.clock), self.clock.step
        # The end is kept too: it is what `pgolf pack` needs, and all if packing fails.
        return (
            finished or bool(every and step % every == 0),
            bool(keep and (finished or step % keep == 0)),
            bool(self.profile and self.profile.due(step)),
        )

    def _logs(self, clock: Clock) -> bool:
        every = clock.step == 1 or clock.step % self.config.run.log_every == 0
        return every or self.schedule.finished(clock)

    def _between_steps(self) -> None:
        """Validate, write a checkpoint: whatever is due."""
        validate, save, trace = self._due()
        step = self.clock.step
        if trace:
            with self.ranks.patient(step, phase="trace"):
                self.profile.at(step)
        if validate:
            with self.ranks.patient(step, phase="validation"), self.session.phases("validation"):
                self.validate()
        if save:
            with self.ranks.patient(step, phase="checkpoint"), self.session.phases("checkpoints"):
                self.checkpoint()

    def synchronize(self) -> None:
        """Wait until all that was queued is done."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def _check_finite(self, step: int, by_rank: list[list[float]]) -> None:
        """Stop if something was not finite: of each rank loss, norm of all, of its matrices."""
        bad = [r for r, numbers in enumerate(by_rank) if not all(map(math.isfinite, numbers))]
        if not bad:
            return
        kept = self.folder.checkpoints()
        whose = [r for r in bad if not all(map(math.isfinite, by_rank[r][::2]))]
        where = f" on rank {whose[0]}" if whose and self.ranks.world > 1 else ""
        error = TrainingError(
            f"the loss or its gradient was not finite at step {step}{where}: "
            "lower the learning rates, or look at the data. "
            + (
                f"The last good checkpoint is {kept[-1]}"
                if kept
                else "No checkpoint was due yet"
            )
        )
        error.quiet = not self.ranks.first
        raise error

    # --- looking and keeping ------------------------------------------------------------------

    def score(self, stride: int, label: str = "") -> Sums:
        """Sums over the validation tokens with the model's present weights, all ranks together."""
        self.model.check_published()
        sums = evaluate(
            self.forward, self.val, self.table, self.config.data.seq_len, stride,
            self.config.eval.eval_tokens, self.ranks, label,
        )  # fmt: skip
        return sums.over(self.ranks)

    def validate(self) -> None:
        """Non-overlapping score of the weights as they train: not averaged, late QAT included."""
        sums = self.score(self.config.data.seq_len)
        self.log.validation(self.clock, sums)

    def state_dict(self) -> dict[str, Any]:
        """Everything that goes on, the same on every rank and for any number of them."""
        self.exchange.gather_weights()
        optimizers = self.optimizers.state_dict(self.exchange.gather)
        averager = self.averager.state_dict()
        for kind in ("ema", "swa"):  # on every rank or on none
            averager[kind] = averager[kind] and self.exchange.gather(averager[kind])
        return {
            "model": self.model.state_dict(),
            "optimizers": optimizers,
            "averager": averager,
            "loader": self.loader.state_dict(),
            "clock": vars(self.clock),
            "phases": self.session.phases.seconds,
        }

    def take_export(self) -> str:
        """Put the weights that are exported into the model, late QAT off; returns their name."""
        state, description = self.averager.export()
        state = self.exchange.gather(state)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(state[name])
        self.qat.turn_off()
        self.exchange.publish()
        self.say(f"exporting {description}")
        return description

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.qat.loaded()
        self.optimizers.load_state_dict(state["optimizers"])
        self.averager.load_state_dict(state["averager"])
        self.exchange.publish()
        self.loader.load_state_dict(state["loader"])
        self.clock = Clock(**state["clock"])
        self.kept = self.clock.step

    def checkpoint(self) -> None:
        """Write a checkpoint (rank 0, of what all gather), if there is room for it."""
        state = self.state_dict()
        try:
            path = self.ranks.on_first(lambda: self.folder.save(self.clock.step, state))
        except StorageError as e:  # on every rank
            self.folder.failed = e
            self.say(f"step:{self.clock.step} warning: no checkpoint: {e}; training goes on")
        else:
            self.kept = self.clock.step
            self.say(f"step:{self.clock.step} checkpoint {path}")
