"""Who gets a folder, and what is kept of a run whose disk is full."""

import os

import pytest

from pgolf.config import Config, with_overrides
from pgolf.errors import ConfigError, InUseError, StorageError
from pgolf.files import claim
from pgolf.training.run_folder import RunFolder


def config(**values) -> Config:
    return with_overrides(Config(recipe="demo"), {"max_steps": 1, **values})


def test_runs_that_start_together_get_folders_of_their_own(tmp_path, monkeypatch):
    """Four processes; each holds its own until all have chosen."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo-seed1337-2").mkdir(parents=True)
    chosen, here = os.pipe()
    wait, go = os.pipe()
    children = []
    for _ in range(4):
        children.append(os.fork())
        if not children[-1]:
            try:  # nothing of this process may go on into pytest
                os.close(go)
                with RunFolder.choose(config()) as path:
                    os.write(here, f"{path.name}\n".encode())
                    os.read(wait, 1)
                os._exit(0)
            finally:
                os._exit(1)
    os.close(here)
    with os.fdopen(chosen) as file:
        names = [file.readline().strip() for _ in children]
    os.close(go)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes == [0] * 4
    assert set(names) == {f"demo-seed1337{n}" for n in ("", "-3", "-4", "-5")}
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["demo-seed1337-2"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_named_folder_in_use_is_an_error(tmp_path, resume):
    out = tmp_path / "run"
    if resume:
        out.mkdir()
        (out / "config.json").write_text("{}")
    asked = config(out=str(out), resume=resume)
    with RunFolder.choose(asked) as path:
        assert path == out
        with pytest.raises(InUseError, match=f"run is in use by process {os.getpid()}"):
            with RunFolder.choose(asked):
                pass
    with RunFolder.choose(asked):  # free again
        pass


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for values, words in (
        ({"out": "file"}, "is a file"),
        ({"out": "run"}, "holds a run already"),
        ({"out": "nothing", "resume": True}, "nothing to resume"),
        ({"resume": True}, "needs out="),
    ):
        if "out" in values:
            values["out"] = str(tmp_path / values["out"])
        with pytest.raises(ConfigError, match=words), RunFolder.choose(config(**values)):
            pass
    with claim(tmp_path / "nothing"):  # a refused folder is not kept
        pass


class Full:
    """A file that takes five bytes, then no more."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, text):
        return self.file.write(text[:5])


def test_metrics_on_a_full_disk(tmp_path, monkeypatch, capsys):
    """No half line, one warning, an error at the end; lines go on when there is room again."""
    from pgolf.training import run_folder

    folder = RunFolder(tmp_path)
    folder.log(step=1)
    folder.check()
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "open", lambda *a, **k: Full(open(*a, **k)), raising=False)
        folder.log(step=2)
        folder.log(step=3)
    folder.log(step=4)
    assert folder.metrics.read_text() == '{"step": 1}\n{"step": 4}\n'
    assert capsys.readouterr().err.count("no space left") == 1
    with pytest.raises(StorageError, match="has ended, but not all .*metrics.jsonl: no space"):
        folder.check()
