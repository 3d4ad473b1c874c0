"""What is on disk is the old content or the new, never a half; failures are told in words."""

import errno
import hashlib
import os

import pytest

from pgolf import files
from pgolf.errors import StorageError
from pgolf.files import atomic_folder, atomic_write, sha256_of, storage_errors
from pgolf.progress import Progress, format_seconds


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("content", ["text é", b"bytes", lambda f: f.write(b"from a function")])
def test_write_replaces_and_leaves_nothing_else(tmp_path, content):
    path = tmp_path / "deep" / "file"
    atomic_write(path, "old")
    atomic_write(path, content)
    expected = {str: lambda c: c.encode(), bytes: bytes}.get(type(content), lambda c: None)(content)
    assert path.read_bytes() == (expected or b"from a function")
    assert names(path.parent) == ["file"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, "old")

    def fails(f):
        f.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"cannot write .*file: no space left"):
        atomic_write(path, fails)
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "old")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder"
    with atomic_folder(path) as f:
        (f / "a").write_text("1")
        assert not path.exists()
    assert names(path) == ["a"]
    with pytest.raises(ValueError), atomic_folder(path) as f:
        (f / "b").write_text("2")
        raise ValueError
    assert names(path) == ["a"] and names(tmp_path) == ["folder"]
    with atomic_folder(path) as f:
        (f / "c").write_text("3")
    assert names(path) == ["c"] and names(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EROFS, "no permission"),
        (errno.EACCES, "no permission"),
        (errno.ENOTDIR, "Not a directory"),
    ],
)
def test_errors_in_words(tmp_path, number, words):
    with pytest.raises(StorageError, match=words), storage_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_sha256(tmp_path):
    content = b"x" * (3 << 20)
    (tmp_path / "f").write_bytes(content)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_progress_has_counts_and_an_eta(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("pgolf.progress.time.monotonic", lambda: clock[0])
    with Progress("reading", 200, "files") as bar:
        clock[0] = 5.0
        bar.update(10)  # too soon for a line
        clock[0] = 20.0
        bar.update(40, "now a.txt")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading: 50/200 files, 20s gone, 1m00s left  now a.txt"


def test_progress_can_be_silent(capsys):
    with Progress("reading", 1, enabled=False, every=0.0) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_seconds():
    assert [format_seconds(s) for s in (0.4, 59.6, 75, 3600)] == ["0s", "1m00s", "1m15s", "1h00m"]
