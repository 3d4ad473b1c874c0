"""A host that runs ahead of its GPU: the clock, the budget and the lines of the log."""

import gc
import math
import re
from dataclasses import replace

import pytest
import torch

from pgolf.errors import TrainingError
from pgolf.training import pace as module
from pgolf.training import trainer as trainer_module

from .test_trainer import asked_to_stop, build, unasked


class Gpu:
    """One that is busy for `steps` seconds each, in turn; the host's clock is `clock`."""

    def __init__(self, clock, steps):
        self.clock, self.steps = clock, iter(steps)
        self.free_at = clock.now
        self.waits = 0

    def event(self):
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    def record(self):
        gpu = self.gpu
        self.at = gpu.free_at = max(gpu.free_at, gpu.clock.now) + next(gpu.steps)

    def synchronize(self):
        self.gpu.waits += self.gpu.clock.now < self.at
        self.gpu.clock.now = max(self.gpu.clock.now, self.at)


@pytest.fixture
def on_gpu(monkeypatch):
    """A trainer whose steps do nothing, for 0.1 s of the host and `steps` seconds of a GPU."""

    def call(steps, *words):
        trainer, folder, clock = build(monkeypatch, "layers=1", *words)

        def step(*args):
            clock.now += 0.1
            return torch.tensor(6.0), torch.tensor(1.0)

        monkeypatch.setattr(trainer, "step", step)
        gpu, longest = Gpu(clock, steps), [0]

        class OnGpu(module.Pace):
            def __init__(self, device, clock):
                super().__init__(device, clock)
                self._on_gpu = True

            def push(self, *args):
                super().push(*args)
                longest[0] = max(longest[0], len(self))

        monkeypatch.setattr(torch.cuda, "Event", gpu.event)
        monkeypatch.setattr(trainer_module, "Pace", OnGpu)
        return trainer, folder, clock, longest

    return call


def test_collections_pass_over_what_was_there():
    with pytest.raises(KeyError), module.frozen_objects():
        assert gc.get_freeze_count() > 1000
        raise KeyError
    assert gc.get_freeze_count() == 0


def forever(seconds):
    while True:
        yield seconds


def test_steps_are_queued_ahead_and_the_clock_is_that_of_the_gpu(on_gpu):
    trainer, folder, clock, longest = on_gpu(
        forever(2.0), "max_seconds=0", "max_steps=30", "val_every=0", "checkpoint_every=0"
    )
    trainer.train(unasked())
    lines = [m for m in folder.lines if m["kind"] == "train"]
    # the first one waits for its own 0.1 s of the host
    assert [m["step"] for m in lines] == list(range(1, 31))
    assert [m["seconds"] for m in lines] == pytest.approx([2.0 * n + 0.1 for n in range(1, 31)])
    assert trainer.clock.seconds == pytest.approx(60.1)
    assert longest == [module.RUN_AHEAD + 1]
    # the host queues a step in 0.1 s and waits for the rest of each; three at the end at once
    assert [m["wait_ms"] for m in lines[3:27]] == pytest.approx([1900.0] * 24)
    assert sum(m["wait_ms"] for m in lines) == pytest.approx(1000 * (60.1 - 30 * 0.1))
    assert [m["tokens_per_second"] for m in lines[1:]] == pytest.approx([128.0] * 29)
    assert all(m["memory"] >= 0 for m in lines)


def test_memory_is_with_that_of_graphs(on_gpu, monkeypatch):
    """Their pool is none of a tensor's while they are not captured."""
    trainer, folder, *_ = on_gpu(forever(2.0), "val_every=0", "checkpoint_every=0")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    trainer.train(unasked())
    assert {m["memory"] for m in folder.lines if m["kind"] == "train"} == {7}


def test_what_looks_at_the_weights_waits_for_all_steps_and_is_off_the_clock(on_gpu):
    words = ("max_seconds=0", "max_steps=20", "val_every=7", "checkpoint_every=10")
    trainer, folder, clock, _ = on_gpu(forever(2.0), *words)
    queued = []
    between = trainer._between_steps
    trainer._between_steps = lambda: (queued.append(trainer.clock.step), between())
    trainer.train(unasked())
    assert queued == [7, 10, 14, 20]
    # at each of these the GPU has nothing to do while the host queues the next step
    assert trainer.clock.seconds == pytest.approx(20 * 2.0 + 4 * 0.1)
    assert clock.now == pytest.approx(50.0 + 40.4 + 3 * 500.0 + 2 * 1000.0)


def test_a_trace_begins_and_ends_with_no_step_on_its_way_and_off_the_clock(on_gpu, monkeypatch):
    words = ("max_seconds=0", "max_steps=20", "val_every=0", "checkpoint_every=0", "profile=5:7")
    trainer, folder, clock, _ = on_gpu(forever(2.0), *words)
    called = []

    def at(step):
        called.append((step, clock.now - 50.0))
        clock.now += 1000.0

    monkeypatch.setattr(trainer.profile, "at", at)
    trainer.train(unasked())
    # the host waits for the step before; it then has 0.1 s to itself
    assert [step for step, _ in called] == [0, 4, 7]
    assert [now for _, now in called] == pytest.approx([0.0, 1008.1, 2014.2])
    assert trainer.clock.seconds == pytest.approx(20 * 2.0 + 3 * 0.1)


@pytest.mark.parametrize("jump", [0.2, 10.0])
@pytest.mark.parametrize("at", [3, 17, 26])
def test_the_budget_holds_when_steps_change(on_gpu, jump, at):
    """As far as a step's length can be known: it is over by less than one that was not."""
    steps = [1.0] * at + [jump] * 600
    trainer, _, _, _ = on_gpu(steps, "max_seconds=60", "val_every=0", "checkpoint_every=0")
    trainer.train(unasked())
    late = trainer.clock.seconds - 60
    assert late < (jump if jump > 1 else 1e-6)
    assert trainer.clock.seconds > 60 - max(jump, 1.0) - 1.5


def test_a_step_that_is_not_finite_is_named(on_gpu, monkeypatch):
    trainer, folder, _, _ = on_gpu(forever(1.0), "val_every=0", "checkpoint_every=0")
    step, taken = trainer.step, []

    def poisoned(*args):
        loss, norm = step(*args)
        taken.append(loss)
        return (loss * math.nan if len(taken) == 5 else loss), norm

    monkeypatch.setattr(trainer, "step", poisoned)
    with pytest.raises(TrainingError, match=re.escape("not finite at step 5: ")):
        trainer.train(unasked())
    assert len(taken) == 5 + module.RUN_AHEAD
    assert [m["step"] for m in folder.lines if m["kind"] == "train"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("by_rank", "where"),
    [
        ([[6.0, math.nan, 1.0], [6.0, math.nan, math.inf]], " on rank 1: "),
        ([[math.nan, math.nan, math.nan], [6.0, math.nan, 1.0]], " on rank 0: "),
        ([[6.0, math.inf, 1e30], [6.0, math.inf, 1e30]], ": "),  # only the sum is too large
    ],
)
def test_the_rank_whose_gradient_is_not_finite_is_named(on_gpu, by_rank, where):
    trainer, _, _, _ = on_gpu(forever(1.0))
    trainer.ranks = replace(trainer.ranks, world=2)
    with pytest.raises(TrainingError, match=re.escape(f"not finite at step 7{where}")):
        trainer._check_finite(7, by_rank)
    trainer._check_finite(7, [[6.0, 1.0, 0.5]] * 2)


def test_a_stop_keeps_the_last_step_that_was_queued(on_gpu):
    trainer, folder, _, _ = on_gpu(forever(1.0), "val_every=0", "checkpoint_every=0")
    with pytest.raises(KeyError, match="3"):
        trainer.train(asked_to_stop())
    assert trainer.kept == 3 == trainer.clock.step
    assert [m["step"] for m in folder.lines if m["kind"] == "train"] == [1, 2, 3]
