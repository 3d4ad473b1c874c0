"""`resume=true`: config.json is what a run goes on with; what may change, and what may not."""

import dataclasses
import json
import shlex
import signal

import pytest

from pgolf.cli import main
from pgolf.config import Config, from_dict, to_dict, with_overrides
from pgolf.data.manifest import Dataset
from pgolf.training.interrupt import Interrupt
from pgolf.training.run_folder import RunFolder, read_config

CHANGED = {"layers": 2, "dim": 64, "heads": 2, "kv_heads": 1, "max_steps": 3, "qat_start": 1.0}


@pytest.fixture
def config() -> Config:
    return with_overrides(Config(recipe="demo"), CHANGED)


@pytest.fixture
def dataset(shards) -> Dataset:
    return Dataset.open(shards)


@pytest.fixture
def run(config, dataset, tmp_path):
    """A folder with a space in its name, of a run with settings that are not the recipe's."""
    folder = RunFolder(tmp_path / "a run")
    folder.open(config, dataset)
    return folder


@pytest.fixture
def resumed(monkeypatch):
    """Type a line as a shell has it; the settings that the run would go on with."""
    for name in ("SEED", "DATA_PATH", "MAX_WALLCLOCK_SECONDS"):
        monkeypatch.delenv(name, raising=False)
    seen = []
    monkeypatch.setattr("pgolf.training.run.run", lambda config, *_: seen.append(config) or 0)

    def call(line: str) -> Config:
        assert main(shlex.split(line)[1:]) == 0
        return seen.pop()

    return call


def test_the_hint_that_is_printed_works(run, config, resumed):
    hint = str(Interrupt(run.path, "demo").error(7, signal.SIGINT, True)).split("`")[1]
    expected = dataclasses.replace(config.run, out=str(run.path), resume=True)
    assert resumed(hint) == dataclasses.replace(config, run=expected)


def test_the_environment_is_not_read_again(run, config, resumed, monkeypatch):
    """The command line may have decided against it when the run began."""
    monkeypatch.setenv("SEED", "9")
    monkeypatch.setenv("MAX_WALLCLOCK_SECONDS", "60")
    monkeypatch.setenv("DATA_PATH", "elsewhere")
    went_on = resumed(f"pgolf train demo 'out={run.path}' resume=true")
    assert dataclasses.replace(went_on, run=config.run) == config
    assert went_on.run.seed == config.run.seed


def test_settings_that_may_change(run, config, dataset, resumed):
    free = "val_tokens=64 eval.stride=8 score_live=off log_every=3 checkpoint_every=5 device=cpu"
    went_on = resumed(f"pgolf train demo 'out={run.path}' run.resume=1 {free}")
    run.open(went_on, dataset)
    kept = from_dict(read_config(run.path))
    assert (kept.eval.val_tokens, kept.eval.stride, kept.run.log_every) == (64, 8, 3)
    assert kept.model == config.model
    assert (kept.run.out, kept.run.resume) == (config.run.out, False)


def test_settings_that_may_not_are_listed_in_one_error(run, capsys, resumed):
    before = (run.path / "config.json").read_bytes()
    words = ["as_published=true", "layers=3", "matrix_lr=0.5", "val_tokens=64", "dim=64"]
    assert main(["train", "pr478", f"out={run.path}", "resume=true", *words]) == 2
    error = capsys.readouterr().err
    for told in (
        "recipe=demo then, pr478 now",
        "as_published=False then, True now",
        "model.layers=2 then, 3 now",
        "optim.matrix_lr=0.025 then, 0.5 now",
    ):
        assert told in error
    assert "val_tokens" not in error and "dim=" not in error and "QAT" not in error
    assert (run.path / "config.json").read_bytes() == before


def test_late_qat_does_not_come_in_between(run, capsys, resumed):
    assert main(["train", "demo", f"out={run.path}", "resume=true", "qat_start=0.5"]) == 2
    error = capsys.readouterr().err
    assert "quant.qat_start=1.0 then, 0.5 now" in error and "Late QAT goes on where" in error


def test_settings_of_an_older_version_have_their_defaults(run, resumed):
    values = to_dict(from_dict(read_config(run.path)))
    del values["run"]["compile_warmup"]
    (run.path / "config.json").write_text(json.dumps(values))
    assert resumed(f"pgolf train demo 'out={run.path}' resume=true").run.compile_warmup == 3


@pytest.mark.parametrize("words", [["resume=true"], ["resume=true", "out=nowhere"]])
def test_nothing_to_go_on_with(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo", *words]) == 2
    assert "out=FOLDER" in (error := capsys.readouterr().err) or "nothing to resume" in error
    assert not list(tmp_path.iterdir())
