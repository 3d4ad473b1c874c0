"""The loop's clock and how it shares out a batch."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgolf.config import Config, parse_overrides, with_overrides
from pgolf.errors import ConfigError, StaleWeights, StorageError
from pgolf.model import GPT
from pgolf.model.init import init_weights
from pgolf.ops.operator import OPERATORS
from pgolf.optim import fused
from pgolf.ranks import Ranks
from pgolf.training import trainer as module
from pgolf.training.passes import micro_steps
from pgolf.training.session import Session
from pgolf.training.trainer import Trainer

from .tiny import TINY, replaced


@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 16), st.integers(1, 400))
def test_micro_steps_share_a_batch_evenly(world, sequences, seq_len, micro_tokens):
    batch = world * sequences * seq_len
    try:
        count = micro_steps(batch, micro_tokens, seq_len, world)
    except ConfigError:
        assert micro_tokens < seq_len
        return
    local = batch // world // count
    assert local * world * count == batch and local % seq_len == 0 and local <= micro_tokens
    fewer = [n for n in range(1, count) if sequences % n == 0]
    assert all(sequences // n * seq_len > micro_tokens for n in fewer)


def test_the_contest_batch():
    assert [micro_steps(786_432, 98_304, 2048, world) for world in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ConfigError, match="batch_tokens=786432"):
        micro_steps(786_432, 98_304, 2048, 7)

SEQ_LEN = 32  # TINY's


class Recorder:
    """Stands in for a run folder: metrics in memory, a slow checkpoint."""

    path = "nowhere"

    def __init__(self, clock):
        self.clock, self.lines = clock, []

    def log(self, **line):
        self.lines.append(line)

    def save(self, step, state):
        self.clock.now += 1000.0
        return "checkpoint"

    def checkpoints(self):
        return []


class Batches:
    """Endless random tokens."""

    def next_batch(self, local_tokens, numbers):
        self.carried = torch.tensor(numbers)
        tokens = torch.randint(0, 400, (2, local_tokens // SEQ_LEN, SEQ_LEN))
        return tokens[0], tokens[1]

    def state_dict(self):
        return {}


def unasked() -> SimpleNamespace:
    """An `Interrupt` of a run that nobody stops."""
    return SimpleNamespace(number=0, error=lambda step, number, kept: KeyError(step))


def asked_to_stop() -> SimpleNamespace:
    return SimpleNamespace(number=2, error=lambda step, number, kept: KeyError(step))


def build(
    monkeypatch, *words: str, ops: dict | None = None
) -> tuple[Trainer, Recorder, SimpleNamespace]:
    """A trainer whose clock moves 2 s a step, 500 s a validation and 1000 s a checkpoint."""
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    settings = replaced(replaced(TINY, ("max_tokens=0", "max_steps=0", "max_seconds=21")), words)
    config = with_overrides(Config(recipe="demo"), parse_overrides(settings))
    model = GPT(config.model, max_length=config.data.seq_len, ops=ops)
    init_weights(model, 0)
    folder = Recorder(clock)
    ranks = Ranks(0, 1, torch.device("cpu"))
    session = Session(config, ranks, None, folder)
    trainer = Trainer(session, model, Batches(), None, None, ops or {})
    step = trainer.step

    def slow_step(*args):
        clock.now += 2.0
        return step(*args)

    def slow_validation():
        clock.now += 500.0

    monkeypatch.setattr(trainer, "step", slow_step)
    monkeypatch.setattr(trainer, "validate", slow_validation)
    return trainer, folder, clock


def test_validation_and_checkpoints_are_off_the_clock(monkeypatch):
    trainer, folder, clock = build(monkeypatch, "val_every=3", "checkpoint_every=4")
    trainer.train(unasked())
    # ten steps of 2 s; an eleventh would end at 22 s, over the budget of 21 s
    assert trainer.clock.step == 10 and trainer.clock.seconds == pytest.approx(20.0)
    # validated at 3, 6, 9 and the end; kept at 4, 8 and the end
    assert clock.now == 50.0 + 20.0 + 4 * 500.0 + 3 * 1000.0
    seconds = [m["seconds"] for m in folder.lines if m["kind"] == "train"]
    assert seconds == pytest.approx([2.0 * (i + 1) for i in range(10)])
    lines = [m for m in folder.lines if m["kind"] == "train"]
    assert [m["tokens_per_second"] for m in lines] == pytest.approx([128.0] * 10)
    assert all(m["wait_ms"] == 0 and "memory" not in m for m in lines)
    spent = trainer.session.phases.seconds
    assert (spent["validation"], spent["checkpoints"]) == (2000.0, 3000.0)


def test_a_full_disk_does_not_stop_training(monkeypatch, capsys):
    """The clock goes on, the checkpoints after it are tried, and it is not forgotten."""
    trainer, folder, _ = build(monkeypatch, "val_every=0", "checkpoint_every=4")
    tried, failed = [], StorageError("cannot write x: no space left")

    def save(step, state):
        tried.append(step)
        raise failed

    monkeypatch.setattr(folder, "save", save)
    trainer.train(unasked())
    assert trainer.clock.step == 10 and tried == [4, 8, 10] and folder.failed is failed
    assert capsys.readouterr().out.count("no space left; training goes on") == 3


def test_a_stop_whose_checkpoint_fails_is_no_stop_to_go_on_from(monkeypatch):
    trainer, folder, _ = build(monkeypatch, "val_every=0", "checkpoint_every=4")

    def save(step, state):
        raise StorageError("cannot write x: no space left")

    def check():
        raise folder.failed

    monkeypatch.setattr(folder, "save", save)
    monkeypatch.setattr(folder, "check", check, raising=False)
    with pytest.raises(StorageError, match="no space left"):
        trainer.train(asked_to_stop())
    monkeypatch.setattr(folder, "save", lambda step, state: "checkpoint")
    with pytest.raises(KeyError, match="2"):  # an earlier failure is no reason not to go on
        trainer.train(asked_to_stop())


def test_a_stop_while_the_last_step_is_validated(monkeypatch):
    """The loop has ended: a stop all the same, with a checkpoint that nothing else asked for."""
    trainer, folder, clock = build(monkeypatch, "val_every=0", "checkpoint_every=0")
    interrupt = unasked()
    monkeypatch.setattr(trainer, "validate", lambda: setattr(interrupt, "number", 2))
    with pytest.raises(KeyError, match="10"):
        trainer.train(interrupt)
    assert trainer.kept == 10 and clock.now == 50.0 + 20.0 + 1000.0


def test_a_resumed_clock_goes_on(monkeypatch):
    trainer, _, _ = build(monkeypatch, "val_every=0", "checkpoint_every=0")
    trainer.clock = module.Clock(step=6, tokens=6 * 256, seconds=12.0)
    trainer.train(unasked())
    assert trainer.clock.step == 10 and trainer.clock.seconds == pytest.approx(20.0)


@pytest.mark.skipif(
    bool(OPERATORS["param_update"].implementations["cpu"].missing()), reason="no C++ kernels"
)
@pytest.mark.parametrize("schedule", ["share", "iterations"])
def test_a_run_through_the_operators_is_one_with_torch(monkeypatch, schedule):
    """Losses, norms and the exported average of 20 steps, with an EMA that starts in the middle."""
    runs = []
    for ops in (dict.fromkeys(fused.OPERATORS, "cpu"), {}):
        torch.manual_seed(0)
        words = ("max_seconds=0", "max_steps=20", "qat_start=1", "ns_dtype=fp32", "val_every=0",
                 "checkpoint_every=0", f"schedule={schedule}", "table_dtype=fp32")  # fmt: skip
        trainer, folder, _ = build(monkeypatch, *words, ops=ops)
        assert bool(trainer.optimizers.fused) == bool(ops)
        trainer.train(unasked())
        assert bool(trainer.loader.carried.numel()) == bool(ops)
        lines = [m for m in folder.lines if m["kind"] == "train"]
        runs.append((lines, trainer.averager.export()))
    (ours, (mine, words)), (torchs, (theirs, same)) = runs
    assert len(ours) == 20 and words == same == "EMA"
    for key in ("loss", "grad_norm"):
        values = [m[key] for m in torchs]
        assert [m[key] for m in ours] == pytest.approx(values, rel=1e-3), key
    for name, average in theirs.items():
        torch.testing.assert_close(mine[name], average, rtol=1e-2, atol=1e-4)


def test_ranks_pace_themselves_by_the_first_ones_measure(monkeypatch):
    """How many steps may be on their way is the same on all, or collectives do not meet."""
    trainer, _, _ = build(monkeypatch)
    trainer.step_seconds = 7.0
    monkeypatch.setattr(Ranks, "decide", lambda self, *values: [0.25 for _ in values])

    def first_step(*args):
        raise KeyError(trainer.step_seconds)

    monkeypatch.setattr(trainer, "_queue_step", first_step)
    with pytest.raises(KeyError, match="0.25"):
        trainer.train(unasked())


@pytest.mark.parametrize("work", [lambda t: t.step(0.0, 0.9), lambda t: t.score(SEQ_LEN)])
def test_weights_that_were_changed_after_publishing_are_not_trained_on(monkeypatch, work):
    """Of a compiled model too, which does not look itself."""
    trainer, *_ = build(monkeypatch)
    trainer.forward = None
    trainer.model.load_state_dict(trainer.model.state_dict())
    with pytest.raises(StaleWeights, match=r"blocks.0.* was changed.*: call Exchange.publish"):
        work(trainer)
