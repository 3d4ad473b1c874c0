"""profile=FIRST:LAST: the trace of these steps and of no others."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from pgolf.config import Config, with_overrides
from pgolf.errors import ConfigError
from pgolf.settings import profiled_steps
from pgolf.training import profile as module
from pgolf.training.trainer import Clock

from .test_trainer import Recorder, asked_to_stop, build, unasked


@pytest.fixture
def traced(monkeypatch, tmp_path):
    """The steps that a run of ten has in its trace; None if it wrote none."""

    def call(text, start=0):
        words = f"profile={text}", "layers=1", "val_every=0", "checkpoint_every=0"
        trainer, folder, clock = build(monkeypatch, *words)
        folder.path = tmp_path

        def step(*args):
            clock.now += 2.0
            with torch.profiler.record_function(f"step {trainer.clock.step + 1}"):
                return torch.tensor(6.0), torch.tensor(1.0)

        monkeypatch.setattr(trainer, "step", step)
        trainer.clock = Clock(step=start, seconds=2.0 * start)
        trainer.train(unasked())
        files = list(tmp_path.glob("profile*"))
        if not files:
            return None
        (file,) = files
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        names = {e["name"] for e in events if e.get("name", "").startswith("step ")}
        steps = sorted(int(name[5:]) for name in names)
        assert file.name == module.FILE.format(steps[0], steps[-1])
        return steps

    return call


@pytest.mark.parametrize(
    ("text", "start", "steps"),
    [("1:1", 0, [1]), ("3:5", 0, [3, 4, 5]), ("3:5", 3, [4, 5]), ("9:99", 0, [9, 10])],
)
def test_these_steps_are_in_it(traced, text, start, steps):
    assert traced(text, start) == steps


def test_steps_that_never_come(traced, capsys):
    for first in (11, 12):  # the first of them would be the next one, or not even that
        assert traced(f"{first}:20") is None
        said = f"warning: profile={first}:20: training was over after step 10, no trace"
        assert said in capsys.readouterr().out


def test_a_full_disk_does_not_stop_training(traced, monkeypatch):
    def write(path, content):
        raise OSError(28, "No space left on device")

    warned = []
    monkeypatch.setattr(module, "atomic_write", write)
    monkeypatch.setattr(Recorder, "warn", lambda self, e: warned.append(e), raising=False)
    assert traced("3:5") is None and "no space left" in str(warned[0])


def test_a_stop_keeps_the_checkpoint_and_then_the_trace(monkeypatch, tmp_path, capsys):
    """And says nothing of steps that are still to come."""
    for text, names in (("1:9", ["profile-1-1.json.gz"]), ("7:9", [])):
        trainer, folder, _ = build(monkeypatch, f"profile={text}", "layers=1", "val_every=0")
        folder.path = tmp_path / text[0]
        folder.path.mkdir()
        saved = []
        monkeypatch.setattr(
            folder, "save", lambda step, state, f=folder, s=saved: s.append([*f.path.iterdir()])
        )
        with pytest.raises(KeyError):
            trainer.train(asked_to_stop())
        assert saved == [[]] and [p.name for p in folder.path.iterdir()] == names
        assert "training was over" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["10", "5:4", "0:3", "a:b", ":", "1:2:3", "-1:2", "1:²"])
def test_bad_values(text):
    with pytest.raises(ConfigError, match=f"profile={text}: expected steps FIRST:LAST"):
        with_overrides(Config(), {"profile": text})


def test_good_values():
    assert profiled_steps("10:13") == (10, 13)
    assert with_overrides(Config(), {"profile": ""}).run.profile == ""


def test_other_ranks_wait_while_the_first_begins_and_writes():
    asked = []
    session = SimpleNamespace(
        config=with_overrides(Config(), {"profile": "3:5"}),
        ranks=SimpleNamespace(on_first=asked.append),
    )
    profile = module.Profile(session)
    for step in range(7):
        if profile.due(step):
            profile.at(step)
    profile.close(7)
    profile.close(7)
    assert len(asked) == 3
