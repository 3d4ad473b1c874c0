"""Schedules against values worked out by hand."""

import dataclasses
import math

import pytest

from pgolf.config import Config, with_overrides
from pgolf.errors import ConfigError
from pgolf.optim.schedule import Clock, Schedule


def schedule(**overrides: object) -> Schedule:
    return Schedule(with_overrides(Config(), overrides))


def by_steps(**overrides: object) -> Schedule:
    return schedule(max_steps=100, **overrides)


def published(**overrides: object) -> Schedule:
    """As the scripts: 600 s, warm-down of 3500 steps at the mean step time."""
    settings = dict(schedule="iterations", max_seconds=600, warmdown_iters=3500)
    return schedule(**settings | overrides)


# --- shares of the run -----------------------------------------------------------------------


def test_share_is_that_of_the_budget_spent_furthest() -> None:
    s = schedule(max_steps=100, max_seconds=60)
    assert s.share(Clock(step=50, seconds=6)) == 0.5
    assert s.share(Clock(step=10, seconds=45)) == 0.75
    assert s.share(Clock(step=10, seconds=90)) == 1.0
    assert s.share(Clock()) == 0.0


def test_a_token_budget_is_a_number_of_whole_steps() -> None:
    s = schedule(max_tokens=1001, batch_tokens=100, seq_len=10, stride=10)
    assert s.max_steps == 11  # the last tokens still take a step
    assert s.share(Clock(step=5)) == pytest.approx(5 / 11)
    both = schedule(max_tokens=1001, batch_tokens=100, seq_len=10, stride=10, max_steps=4)
    assert both.max_steps == 4


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1.0), (59, 1.0), (60, 1.0), (70, 0.75), (90, 0.25), (100, 0.0)]
)
def test_warmdown_by_share(step: int, expected: float) -> None:
    s = by_steps(warmdown=0.4)
    assert s.warmdown(Clock(step=step)) == pytest.approx(expected)
    assert s.lr_scale(Clock(step=step)) == pytest.approx(expected)
    floored = by_steps(warmdown=0.4, lr_floor=0.1)
    assert floored.lr_scale(Clock(step=step)) == pytest.approx(0.1 + 0.9 * expected)


def test_warmdown_of_nothing_and_of_everything() -> None:
    assert by_steps(warmdown=0).warmdown(Clock(step=99)) == 1.0
    whole = by_steps(warmdown=1)
    assert [whole.warmdown(Clock(step=s)) for s in (0, 25, 100)] == [1.0, 0.75, 0.0]


def test_by_share_the_machine_does_not_matter() -> None:
    """The same recipe at 100 ms and at 5 s a step: the same multiplier at the same share."""
    s = schedule(max_seconds=600, warmdown=0.52)
    fast = [s.warmdown(Clock(step=k * 60, seconds=k * 6.0)) for k in range(100)]
    slow = [s.warmdown(Clock(step=k, seconds=k * 6.0)) for k in range(100)]
    assert fast == slow


@pytest.mark.parametrize(("step", "expected"), [(0, 0.92), (10, 0.955), (20, 0.99), (90, 0.99)])
def test_momentum_by_share(step: int, expected: float) -> None:
    assert by_steps(momentum_warmup=0.2).momentum(Clock(step=step)) == pytest.approx(expected)
    assert by_steps(momentum_warmup=0).momentum(Clock()) == pytest.approx(0.99)


def test_qat_switch_and_its_learning_rate() -> None:
    s = by_steps(qat_start=0.9, qat_lr_scale=0.5, warmdown=0.2)
    assert [s.qat(Clock(step=k)) for k in (0, 89, 90, 100)] == [False, False, True, True]
    assert s.lr_scale(Clock(step=89)) == pytest.approx(0.55)
    assert s.lr_scale(Clock(step=90)) == pytest.approx(0.25)
    assert not by_steps(qat_start=1.0).qat(Clock(step=100)), "1 is never"
    assert by_steps(qat_start=0.0).qat(Clock())


# --- the published form ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "seconds", "expected"),
    [
        (0, 0.0, 1.0),  # no mean step time yet
        (1000, 88.5, 1.0),  # tail 309.75 s, 511.5 s left
        (3000, 265.9, 1.0),  # tail 310.2 s, 334.1 s left
        (4000, 354.5, (600 - 354.5) / (3500 * 354.5 / 4000)),
        (6000, 531.9, (600 - 531.9) / (3500 * 531.9 / 6000)),
        (6766, 600.1, 0.0),
        # one GPU: 0.66 s a step, tail 2310 s: 0.26 from the first measured step on
        (1, 0.66, (600 - 0.66) / (3500 * 0.66)),
        (450, 297.0, (600 - 297) / 2310),
    ],
)
def test_published_warmdown(step: int, seconds: float, expected: float) -> None:
    assert published().warmdown(Clock(step=step, seconds=seconds)) == pytest.approx(expected)


def test_published_warmdown_reproduces_the_trap_on_one_gpu() -> None:
    s = published()
    assert s.warmdown(Clock(step=1, seconds=0.66)) == pytest.approx(0.2594, abs=1e-4)


def test_published_warmdown_on_steps() -> None:
    s = schedule(schedule="iterations", max_steps=1000, warmdown_iters=200)
    scales = [s.warmdown(Clock(step=k, seconds=k * 1.0)) for k in (0, 799, 800, 900, 999, 1000)]
    assert scales == pytest.approx([1, 1, 1, 0.5, 0.005, 0])
    longer = schedule(schedule="iterations", max_steps=100, warmdown_iters=400)
    assert longer.warmdown(Clock(step=0)) == pytest.approx(0.25)
    flat = schedule(schedule="iterations", max_steps=100, warmdown_iters=0)
    assert [flat.warmdown(Clock(step=k)) for k in (0, 99, 100)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.92), (750, 0.955), (1500, 0.99), (9000, 0.99)]
)
def test_published_momentum(step: int, expected: float) -> None:
    s = published(momentum_warmup_iters=1500)
    assert s.momentum(Clock(step=step, seconds=1.0)) == pytest.approx(expected)
    assert published(momentum_warmup_iters=0).momentum(Clock()) == pytest.approx(0.99)


# --- the end ---------------------------------------------------------------------------------


def test_what_is_reserved_is_not_trained_in() -> None:
    s = schedule(max_seconds=100, reserve_s=20, warmdown=0.5)
    assert s.share(Clock(step=1, seconds=40)) == 0.5
    assert s.warmdown(Clock(step=1, seconds=60)) == 0.5
    assert not s.finished(Clock(step=10, seconds=70)) and s.finished(Clock(step=10, seconds=75))
    with pytest.raises(ConfigError, match="reserve_s=100 leaves nothing of max_seconds=100"):
        schedule(max_seconds=100, reserve_s=100)


def test_finished_by_steps_tokens_and_time() -> None:
    assert [by_steps().finished(Clock(step=k)) for k in (0, 99, 100)] == [False, False, True]
    s = schedule(max_seconds=10)
    assert not s.finished(Clock())
    assert not s.finished(Clock(step=9, seconds=9.0))  # one more of 1 s fits exactly
    assert s.finished(Clock(step=9, seconds=9.1))
    assert s.finished(Clock(step=10, seconds=10.0))


def test_steps_left_is_the_smaller_estimate() -> None:
    s = schedule(max_steps=100, max_seconds=60)
    assert s.steps_left(Clock()) == 100
    assert s.steps_left(Clock(step=10, seconds=10.0)) == 50
    assert s.steps_left(Clock(step=90, seconds=10.0)) == 10
    assert s.steps_left(Clock(step=100, seconds=70.0)) == 0


# --- averaging -------------------------------------------------------------------------------


def clocks(steps: int, seconds: float = 0.0) -> list[tuple[Clock, Clock]]:
    every = [Clock(step=k, seconds=k * seconds) for k in range(steps + 1)]
    return list(zip(every, every[1:], strict=False))


def test_ema_decay_by_share_is_the_published_one_at_record_speed() -> None:
    """0.997 a step is a time constant of 333 steps: over 6800 of them a share of 0.049."""
    horizon = 1 / (-math.log(0.997) * 6800)
    assert horizon == pytest.approx(0.049, abs=5e-4)
    s = schedule(max_steps=6800, ema_start=0, ema_horizon=horizon)
    for k in (0, 100, 6799):
        decay = s.ema_decay(Clock(step=k), Clock(step=k + 1))
        assert decay == pytest.approx(0.997, rel=1e-9)


def test_ema_forgets_by_share_whatever_the_number_of_steps() -> None:
    for steps in (50, 1000):
        s = schedule(max_steps=steps, ema_start=0.0, ema_horizon=0.1)
        kept = math.prod(s.ema_decay(a, b) for a, b in clocks(steps))
        assert kept == pytest.approx(math.exp(-10), rel=1e-6)


def test_ema_starts_from_the_weights_at_its_start() -> None:
    s = by_steps(ema_start=0.3, ema_horizon=0.05)
    decays = [s.ema_decay(a, b) for a, b in clocks(100)]
    assert decays[:29] == [None] * 29  # after steps 1 to 29
    assert decays[29] == 0.0
    assert decays[30:] == pytest.approx([math.exp(-0.2)] * 70)


def test_published_ema_holds_a_third_of_the_initial_weights_after_366_steps() -> None:
    s = published()
    kept = math.prod(s.ema_decay(a, b) for a, b in clocks(366, 1.6))
    assert kept == pytest.approx(0.997**366)
    assert kept == pytest.approx(1 / 3, abs=1e-3)


def count_snapshots(s: Schedule, steps: int, seconds: float = 0.0) -> list[int]:
    return [b.step for a, b in clocks(steps, seconds) if s.swa_snapshot(a, b)]


def test_published_swa_every_50_steps_below_its_multiplier() -> None:
    s = published(swa_start_lr=0.4, swa_every_iters=50, warmdown_iters=3000)
    # 0.1 s a step: tail 300 s, m < 0.4 once less than 120 s are left, after step 4800
    steps = count_snapshots(s, 6000, 0.1)
    assert steps == list(range(4850, 6001, 50)) and len(steps) == 24
    # the multiplier of the step itself, at its start, decides
    on_time = schedule(
        schedule="iterations",
        max_steps=1000,
        warmdown_iters=1000,
        swa_start_lr=0.5005,  # between the multipliers at steps 499 and 500
        swa_every_iters=100,
    )
    assert count_snapshots(on_time, 1000) == [600, 700, 800, 900, 1000]


def test_swa_by_share() -> None:
    s = by_steps(swa_start=0.8, swa_every=0.05)
    assert count_snapshots(s, 100) == [80, 85, 90, 95, 100]
    often = schedule(max_steps=10, swa_start=0.5, swa_every=0.01)
    assert count_snapshots(often, 10) == [5, 6, 7, 8, 9, 10]  # never twice after one step
    assert count_snapshots(schedule(max_steps=10, swa_start=0.0, swa_every=0.5), 10) == [5, 10]


def test_a_schedule_holds_no_state() -> None:
    s = by_steps(qat_start=0.5)
    late = s.lr_scale(Clock(step=90))
    assert s.lr_scale(Clock(step=0)) == 1.0
    assert s.lr_scale(Clock(step=90)) == late
    assert dataclasses.astuple(Clock()) == (0, 0, 0.0)


def test_published_qat_begins_at_a_learning_rate_multiplier() -> None:
    """PR 543: below 0.1 of the warm-down; the halved rate does not move the switch."""
    s = published(qat_start=0.9, qat_start_lr=0.1, qat_lr_scale=0.5)
    # 0.1 s a step: the tail of 3500 steps is 350 s, a tenth of it is the last 35 s
    before, after = Clock(step=5640, seconds=564.0), Clock(step=5660, seconds=566.0)
    assert not s.qat(before) and s.qat(after)
    assert s.lr_scale(after) == pytest.approx(0.5 * 34 / 350)
    assert not published(qat_start=1.0).qat(after), "1 is never"
