"""A disk that fails, or what it would hold if the process were killed, at any one of its calls."""

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def full_where(chosen: Callable[[int, str, str], bool]) -> Callable[[int, str, str], None]:
    """A `before` of a disk that has no space left at the calls that are chosen."""

    def before(*call) -> None:
        if chosen(*call):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return before


class FaultyDisk:
    """Sees each mkdir, open for writing, write, fsync and rename below a folder before it happens.

    Args:
        folder: other places are left alone.
        before: is given the number of the call, from 1 on, what it is, and the file; what it
            raises, the call does.

    Attributes:
        calls: (what, file), in order.
    """

    def __init__(self, monkeypatch, folder: Path, before: Callable[[int, str, str], object]):
        self.folder, self.before, self.calls = str(folder), before, []
        self._open = builtins.open
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", self.opened)
        for name in ("mkdir", "fsync", "replace", "open"):
            monkeypatch.setattr(os, name, self._seen(name, getattr(os, name)))

    def note(self, what: str, path: str) -> None:
        if path.startswith(self.folder):
            self.calls.append((what, path))
            self.before(len(self.calls), what, path)

    def _seen(self, name: str, call: Callable) -> Callable:
        def run(target, *args, **kwargs):
            if name == "fsync":
                self.note(name, os.readlink(f"/proc/self/fd/{target}"))
            elif name == "replace" or (name == "open" and args[0] & os.O_CREAT):
                self.note(name, os.path.abspath(target))
            elif name == "mkdir" and not os.path.isdir(target):
                self.note(name, os.path.abspath(target))
            return call(target, *args, **kwargs)

        return run

    def opened(self, file, mode="r", buffering=-1, encoding=None, *rest, **named):
        path = "" if isinstance(file, int) else os.path.abspath(os.fspath(file))
        if not path.startswith(self.folder) or "r" in mode:
            return self._open(file, mode, buffering, encoding, *rest, **named)
        self.note("open", path)
        raw = _Raw(path, mode.replace("b", ""))
        raw.note = lambda: self.note("write", path)
        if buffering == 0:
            return raw
        binary = io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding=encoding)


class _Raw(io.FileIO):
    """A file whose writes are seen; one that fails has written half."""

    def write(self, data) -> int:
        try:
            self.note()
        except OSError:
            super().write(memoryview(data).cast("B")[: len(data) // 2])
            raise
        return super().write(data)


class Kills:
    """What lies in a folder before each call: what a kill there would leave.

    Args:
        kept: where copies go, one a call.
    """

    def __init__(self, folder: Path, kept: Path):
        self.folder, self.kept = folder, kept

    def __call__(self, number: int, *_: str) -> None:
        shutil.copytree(self.folder, self.kept / str(number))
