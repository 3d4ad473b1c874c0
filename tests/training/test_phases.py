"""The ledger of a run: every second once, and which limit it counts against."""

from types import SimpleNamespace

import pytest

from pgolf.config import Config
from pgolf.optim.schedule import Schedule
from pgolf.ranks import ALONE
from pgolf.recipes import get
from pgolf.training import phases as module
from pgolf.training import run
from pgolf.training.phases import PHASES, Phases, limits


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    return clock


def test_a_second_counts_once_for_the_innermost_phase(clock):
    phases = Phases()
    clock.now += 1
    with pytest.raises(KeyError), phases("training"):
        clock.now += 10
        with phases("validation"):
            clock.now += 100
        clock.now += 10
        raise KeyError
    clock.now += 1
    with phases("validation"):
        clock.now += 100
    rows = phases.ledger(19.0, {"training": ("max_seconds", 60.0)})
    assert list(rows) == [*PHASES, "total"]
    spent = {name: row["seconds"] for name, row in rows.items() if row["seconds"]}
    # a second of the loop was off the training clock
    assert spent == {"training": 19.0, "validation": 200.0, "other": 3.0, "total": 222.0}
    assert rows["training"] == {
        "seconds": 19.0, "on_clock": True, "limit": "max_seconds", "limit_seconds": 60.0
    }  # fmt: skip
    assert not rows["validation"]["on_clock"] and rows["validation"]["limit"] is None


def test_limits():
    assert limits(Config(), contest=False) == {}
    config = get("pr1473").config({"reserve_s": 20})
    assert limits(config, contest=True) == {
        "training": ("max_seconds - reserve_s", 580.0),
        "calibration": ("reserve_s", 20.0),
        "quantisation": ("reserve_s", 20.0),
        "scoring": ("evaluation", 600.0),
    }
    assert limits(config, True)["training"][1] == Schedule(config).max_seconds
    rows = Phases().ledger(0.0, limits(config, contest=True))
    assert [n for n, r in rows.items() if r["on_clock"]] == [
        "training", "calibration", "quantisation"
    ]  # fmt: skip


def test_a_resumed_run_counts_what_came_before(clock):
    phases = Phases()
    state = {"clock": {}, "phases": {"training": 40.0, "validation": 7.0}}
    trainer = SimpleNamespace(
        session=SimpleNamespace(phases=phases, say=print, ranks=ALONE),
        schedule=SimpleNamespace(finished=lambda clock: False),
        warm_up=lambda: setattr(clock, "now", clock.now + 3),
        load_state_dict=lambda state: None,
        clock=SimpleNamespace(step=5),
        compiled=False,
        qat=SimpleNamespace(on=False),
    )
    folder = SimpleNamespace(
        path="run", load=lambda device: (state, "here"), forget_after=lambda step: None
    )
    run.resume(trainer, folder)
    with phases("training"):
        clock.now += 2
    assert phases.seconds == {"other": 0.0, "warm_up": 3.0, "training": 42.0, "validation": 7.0}
