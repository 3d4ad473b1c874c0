"""log=tensorboard,trackio: rows reach these, and neither their absence nor their end is a crash."""

import sys
from types import SimpleNamespace

import pytest

from pgolf.cli import main
from pgolf.config import Config, to_dict, with_overrides
from pgolf.ranks import ALONE
from pgolf.training.mirrors import mirrored
from pgolf.training.run_folder import RunFolder

ROWS = (
    {"kind": "train", "step": 6, "tokens": 1536, "loss": 5.5},
    {"kind": "event", "step": 7, "tokens": 1536, "text": "late QAT on"},
    {"kind": "val", "step": 7, "bpb": 2.5},
)


@pytest.fixture
def called(monkeypatch):
    """The calls that stand-ins of both libraries get; those named in `broken` fail."""
    calls, broken = [], set()

    def note(name):
        def call(*args, **kwargs):
            calls.append((name, *args, *kwargs.items()))
            if name in broken:
                raise OSError("no network")

        return call

    class Writer:
        def __init__(self, place, purge_step):
            calls.append(("open", place, purge_step))

        add_scalar, add_text = staticmethod(note("scalar")), staticmethod(note("text"))
        close = staticmethod(note("close"))

    def init(**how):
        calls.append(("init", how))
        return SimpleNamespace(log=note("log"), finish=note("finish"))

    library = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", library)
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    return SimpleNamespace(calls=calls, broken=broken)


@pytest.fixture
def logged(tmp_path, called):
    """Log `ROWS` in a run with these settings; the lines of metrics.jsonl."""

    def call(**settings):
        folder = RunFolder(tmp_path)
        with mirrored(with_overrides(Config(recipe="demo"), {"max_steps": 9, **settings}), ALONE,
                      folder):  # fmt: skip
            assert not called.calls, "nothing is made before there is a row"
            for row in ROWS:
                folder.log(**row)
        return len(folder.metrics.read_text().splitlines())

    return call


def test_tensorboard(logged, called, tmp_path):
    assert logged(log="tensorboard") == 3
    assert called.calls == [
        ("open", str(tmp_path / "tensorboard"), 6),
        ("scalar", "train/tokens", 1536, 6), ("scalar", "train/loss", 5.5, 6),
        ("text", "event", "late QAT on", 7), ("scalar", "val/bpb", 2.5, 7), ("close",),
    ]  # fmt: skip


@pytest.mark.parametrize("resume", [False, True])
def test_trackio(logged, called, tmp_path, resume):
    assert logged(log="trackio", resume=resume) == 3
    (_, how), *rest = called.calls
    assert (how["project"], how["name"]) == ("pgolf", tmp_path.name)
    assert how["resume"] == ("allow" if resume else "never")
    assert how["config"] == to_dict(
        with_overrides(Config(recipe="demo"), dict(log="trackio", resume=resume, max_steps=9))
    )
    assert rest == [
        ("log", {"train/tokens": 1536, "train/loss": 5.5}, ("step", 6)),
        ("log", {"event": "late QAT on"}, ("step", 7)),
        ("log", {"val/bpb": 2.5}, ("step", 7)), ("finish",),
    ]  # fmt: skip


def test_one_that_fails_is_left_out_and_costs_nothing(logged, called, capsys):
    called.broken.add("log")
    assert logged(log="trackio,tensorboard") == 3
    error = capsys.readouterr().err
    assert error == "warning: log=trackio: no network; training goes on without\n"
    names = [name for name, *_ in called.calls]
    assert names.count("log") == 1 and names.count("scalar") == 3 and names[-1] == "close"


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("tensorboard", "log=tensorboard needs the library tensorboard, which does not load"),
        ("trackio", "log=trackio needs the library trackio, which does not load"),
        ("wandb", "log=wandb: 'wandb' is not one of tensorboard, trackio"),
        ("trackio,", "log=trackio,: '' is not one of"),
    ],
)
def test_said_before_a_run_begins(log, message, monkeypatch, tmp_path, capsys):
    here = "," in log and SimpleNamespace()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if not installed
    monkeypatch.setitem(sys.modules, "trackio", here or None)
    out = tmp_path / "run"
    assert main(["train", "demo", f"log={log}", f"out={out}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()
    assert "pip install 'pgolf[log]'" in error or "not one of" in error
