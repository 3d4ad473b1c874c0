"""A short run whose disk fails, or which is killed, at every call that changes a file."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from pgolf.training import finish, run
from pgolf.training.run_folder import RunFolder

from .faulty_disk import FaultyDisk, Kills, full_where

pytestmark = pytest.mark.slow

# Two steps of the smallest model, a checkpoint after each.
WORDS = (
    "layers=1", "dim=32", "heads=2", "kv_heads=1", "mlp_hidden=32", "ve_layers=", "xsa_layers=",
    "batch_tokens=64", "micro_tokens=64", "max_steps=2", "max_tokens=0", "checkpoint_every=1",
    "val_every=0", "val_tokens=64", "eval_tokens=64", "stride=32", "score_live=false",
    "calibration_sequences=2", "qat_start=1",
)  # fmt: skip


REPORT_LINE = finish.report_line  # which fixtures replace


@pytest.fixture
def trained(train, monkeypatch):
    """Train in a folder, and not more; returns (exit code, output)."""
    monkeypatch.setattr(run, "finish", lambda *_: {})
    monkeypatch.setattr(run, "frozen_objects", nullcontext)  # a look at all of pytest's objects
    return lambda out, *words: train(f"out={out}", *WORDS, *words)


@pytest.fixture
def count(trained, tmp_path):
    """How many calls there are."""
    with pytest.MonkeyPatch.context() as patch:
        disk = FaultyDisk(patch, tmp_path / "0", full_where(lambda *_: False))
        assert trained(tmp_path / "0" / "run")[0] == 0
    return len(disk.calls)


def left(folder: Path) -> list[str]:
    """What is there that should not be."""
    return [p.name for p in folder.rglob(".*")]


def files(folder: Path) -> frozenset[tuple[str, int]]:
    """Every one, with its size."""
    return frozenset(
        (re.sub(r"\d+.tmp", "tmp", str(p.relative_to(folder))), p.stat().st_size)
        for p in folder.rglob("*")
        if p.is_file()
    )


def last_step(out: Path) -> int:
    """Of the newest checkpoint, which has to be whole; 0 without one."""
    folder = RunFolder(out, writes=False)
    if not folder.checkpoints():
        return 0
    state, path = folder.load("cpu")
    assert path == folder.checkpoints()[-1]
    return state["clock"]["step"]


def test_a_disk_that_is_full_at_any_call(trained, count, tmp_path):
    """Before the first step nothing is left; after it training goes on, and the end says so."""
    begun, steps = [], set()
    for at in range(1, count + 1):
        out = tmp_path / str(at) / "run"
        with pytest.MonkeyPatch.context() as patch:
            disk = FaultyDisk(patch, out.parent, full_where(lambda n, *_, at=at: n == at))
            code, said = trained(out)
        where = disk.calls[at - 1]
        assert code == 2 and said.count("pgolf: error:") == 1 and "Traceback" not in said, said
        assert "no space left" in said.splitlines()[-1], said
        assert left(out.parent) == [], where
        begun.append("step:2/2" in said)
        assert begun[-1] == out.exists(), (where, said)
        if begun[-1]:
            steps.add(step := last_step(out))
            if step == 1:
                assert trained(out, "resume=true")[0] == 0 and last_step(out) == 2, where
    assert steps == {1, 2}
    assert begun == sorted(begun) and set(begun) == {False, True}


def test_a_kill_at_any_call(trained, tmp_path):
    """What is left then is gone on with, or begun anew."""
    place = tmp_path / "run"
    place.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        disk = FaultyDisk(patch, place, Kills(place, tmp_path))
        assert trained(place / "run")[0] == 0
    steps, seen = [], set()
    for number, where in enumerate(disk.calls, 1):
        out = tmp_path / str(number) / "run"
        steps.append(last_step(out))
        if (there := files(out.parent)) in seen:
            continue
        seen.add(there)
        if steps[-1]:
            assert trained(out, "resume=true")[0] == 0, where
            assert last_step(out) == 2 and left(out.parent) == [], where
        elif (out / "config.json").exists():
            for words in (), ("resume=true",):
                code, said = trained(out, *words)
                assert code == 2 and "another" in said.splitlines()[-1], said
        else:
            assert trained(out)[0] == 0 and last_step(out) == 2 and left(out.parent) == [], where
    assert steps == sorted(steps) and set(steps) == {0, 1, 2}


def test_a_disk_that_is_full_after_training(train, monkeypatch, tmp_path):
    """What was trained is kept, and packed and scored once there is room."""
    monkeypatch.setattr(finish, "report_line", REPORT_LINE)
    out = tmp_path / "run"
    for name in ("artifact", "result.json", "report.html"):
        with pytest.MonkeyPatch.context() as patch:
            FaultyDisk(patch, tmp_path, full_where(writes_to(name)))
            code, said = train(f"out={out}", *WORDS, *["resume=true"] * out.exists())
        assert code == 2 and f"cannot write {out / name}: no space left" in said, said
        assert "Traceback" not in said and left(tmp_path) == []
        assert not (out / name).exists() and last_step(out) == 2
    assert (out / "result.json").exists()
    assert train(f"out={out}", *WORDS, "resume=true")[0] == 0 and (out / name).exists()


def writes_to(name: str):
    """Whether a call writes to a file of that name, however it is called meanwhile."""
    return lambda _, what, path: what == "write" and Path(path).name.startswith(f".{name}.")
