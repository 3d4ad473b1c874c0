"""What is on disk is the old content or the new, never a half; failures are told in words."""

import errno
import hashlib
import os
from unittest.mock import MagicMock

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


class Faults:
    """Fails the call number `at` of those that change the disk, by `fail`; counts them all."""

    def __init__(self, monkeypatch, at: int, fail):
        self.calls, self.at, self.fail = 0, at, fail
        for name in ("fsync", "replace", "open"):
            monkeypatch.setattr(files.os, name, self.wrapped(getattr(os, name)))
        monkeypatch.setattr(files, "open", self.opened, raising=False)

    def wrapped(self, call):
        def run(*args, **kwargs):
            self.calls += 1
            if self.calls == self.at:
                self.fail()
            return call(*args, **kwargs)

        return run

    def opened(self, path, mode="r"):
        file = self.wrapped(open)(path, mode)
        if "w" not in mode:
            return file
        faulty = MagicMock(wraps=file)
        faulty.write, faulty.flush = self.wrapped(file.write), self.wrapped(file.flush)
        faulty.__enter__.return_value = faulty
        faulty.__exit__.side_effect = lambda *exc: file.__exit__(*exc)
        return faulty


def disk_error():
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def write_file(path):
    atomic_write(path, lambda f: [f.write(b"new "), f.write(b"content")])


def write_folder(path):
    with atomic_folder(path) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(f"new {name}")


def content(path) -> dict[str, str]:
    """Of a file or folder, by name."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {p.name: p.read_text() for p in files}


def prepared(folder, write):
    """A path in a new folder where something old stands."""
    path = folder / "x"
    (folder if write is write_file else path).mkdir(parents=True)
    (path if write is write_file else path / "c").write_text("old")
    return path


def count_calls(folder, write) -> int:
    path = prepared(folder, write)
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, 0, None)
        write(path)
    return faults.calls


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_an_error_in_any_call_leaves_the_old_or_the_new(tmp_path, write):
    """Every write, flush, fsync, open and rename fails in turn."""
    calls = count_calls(tmp_path / "0", write)
    old, new = content(prepared(tmp_path / "old", write)), content(tmp_path / "0" / "x")
    left = []
    for at in range(1, calls + 1):
        path = prepared(tmp_path / str(at), write)
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, at, disk_error)
            try:
                write(path)
            except StorageError:
                assert names(path.parent) == ["x"], at
            else:  # only what tidies up may fail unheard
                assert content(path) == new, at
        left.append([old, new].index(content(path)))
    assert left == sorted(left) and set(left) == {0, 1}


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_kill_in_any_call_leaves_the_old_or_the_new(tmp_path, write):
    """The process ends there without a word."""
    calls = count_calls(tmp_path / "0", write)
    old, new = content(prepared(tmp_path / "old", write)), content(tmp_path / "0" / "x")
    left = []
    for at in range(1, calls + 1):
        path = prepared(tmp_path / str(at), write)
        child = os.fork()
        if not child:
            Faults(pytest.MonkeyPatch(), at, lambda: os._exit(7))
            write(path)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, at
        if not path.exists():  # between the two renames of a folder: the old one stands beside it
            path = next(p for p in path.parent.iterdir() if p.name.endswith(".old.tmp"))
        left.append([old, new].index(content(path)))
    assert left == sorted(left) and set(left) == {0, 1}


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
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EROFS, "no permission"),
        (errno.EACCES, "no permission"),
        (errno.ENOTDIR, "Not a directory"),
    ],
)
def test_errors_in_words(tmp_path, number, message):
    with pytest.raises(StorageError, match=message), storage_errors(tmp_path):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_errors_name_no_option_of_one_command(tmp_path, number):
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert "out" not in str(caught.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_symbolic_link_is_followed(tmp_path, write):
    """Also one whose target is still to be made."""
    for made in (True, False):
        target = tmp_path / f"{made}" / "x"
        target.parent.mkdir()
        if made:
            write(target)
        link = tmp_path / f"link to {made}"
        link.symlink_to(target)
        write(link)
        assert link.is_symlink() and not target.is_symlink() and content(target)
        assert names(target.parent) == ["x"]


def test_what_is_no_place_for_a_file_or_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path / "here")
    for place in (".", "", "..", "/"):
        with pytest.raises(StorageError, match="it is a folder"):
            atomic_write(place, "text")
        with pytest.raises(StorageError, match="the folder that you are in"):
            write_folder(place)
    with pytest.raises(StorageError, match="a device or the like"):
        atomic_write(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo() and names(tmp_path) == ["here", "pipe"]


def test_names_that_are_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9")
    atomic_write(path, f"written to {path.name}")
    assert path.read_text() == "written to caf\\udce9"
    with atomic_folder(path.with_name(os.fsdecode(b"\xff"))) as folder:
        (folder / "a").write_text("1")
    assert len(names(tmp_path)) == 2


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
