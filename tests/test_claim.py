"""A place that one process writes to is no other's meanwhile, and is free once that has ended."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf import files
from pgolf.errors import InUseError, StorageError
from pgolf.files import claim

ROOT = Path(__file__).resolve().parents[1]
HOLDS = """
import os, sys
from pgolf.files import claim
with claim(sys.argv[1]):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has claimed tmp_path/x."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "x")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert int(process.stdout.readline()) == process.pid
    yield process
    process.kill()
    process.communicate()


def test_in_use_names_the_process_until_it_has_ended(tmp_path, holder):
    path = tmp_path / "x"
    with pytest.raises(InUseError, match=f"x is in use by process {holder.pid}: choose another"):
        with claim(path):
            pass
    with claim(tmp_path / "y"):  # beside it
        pass
    holder.kill()
    holder.wait()
    assert (tmp_path / ".x.lock").exists(), "killed: nobody has tidied up"
    with claim(path) as real:
        assert real == path
        with pytest.raises(InUseError, match=str(os.getpid())), claim(path):
            pass
    assert not list(tmp_path.iterdir())


def test_waiting_says_so(tmp_path, holder, capfd, monkeypatch):
    flock = files.fcntl.flock

    def let_go(file, operation):
        if operation == files.fcntl.LOCK_EX:
            holder.communicate()
        flock(file, operation)

    def output():
        return capfd.readouterr().err

    monkeypatch.setattr(files.fcntl, "flock", let_go)
    with claim(tmp_path / "x", wait=True):
        assert f"waiting: {tmp_path / 'x'} is in use by process {holder.pid}" in output()
        assert (tmp_path / ".x.lock").read_text().startswith(f"{os.getpid()} ")


def test_another_name_of_the_place_is_the_same(tmp_path):
    (tmp_path / "link").symlink_to("x")
    with claim(tmp_path / "link") as real, pytest.raises(InUseError):
        assert real == tmp_path / "x"
        with claim(tmp_path / "x"):
            pass


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".x.123.tmp").mkdir()
    (tmp_path / ".x.124.tmp").write_text("half")
    kept = [".x.123.old.tmp", ".xy.123.tmp", ".x.a.tmp"]
    for name in kept:
        (tmp_path / name).write_text("not ours")
    with claim(tmp_path / "x"):
        pass
    assert {p.name for p in tmp_path.iterdir()} == set(kept)


@pytest.mark.parametrize(
    ("held_by", "free"),
    [("{me} {host}", False), ("4194305 {host}", True), ("7 elsewhere", False), ("", True)],
)
def test_a_file_system_without_locks(tmp_path, monkeypatch, held_by, free):
    """The lock file's words have to do; of another host nothing is known."""

    def unsupported(*args):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    lock = tmp_path / ".x.lock"
    lock.write_text(held_by.format(me=os.getpid(), host=files.platform.node()))
    if free:
        with claim(tmp_path / "x"):
            assert lock.read_text().startswith(f"{os.getpid()} ")
        return
    who = "process 7 on elsewhere" if "7" in held_by[:1] else f"process {os.getpid()}"
    with pytest.raises(InUseError, match=f"{who}, .* no locks: .* remove .*lock"):
        with claim(tmp_path / "x"):
            pass
    assert lock.exists()


def test_a_folder_in_which_alone_one_may_write(tmp_path, monkeypatch):
    inside = tmp_path / "mounted"
    inside.mkdir()
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path)
    with claim(inside):
        assert (inside / ".lock").exists()
    assert not list(inside.iterdir())


def test_no_permission_is_told_at_once(tmp_path, monkeypatch):
    def refused(*args):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.os, "open", refused)
    with pytest.raises(StorageError, match="no permission"), claim(tmp_path / "x"):
        pass
