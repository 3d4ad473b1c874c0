"""Writing files so that a reader sees the old content or the new, never a half.

All that pgolf writes goes through `atomic_write` or `atomic_folder`; only metrics.jsonl grows by
lines, and resuming drops one that is not whole. Symbolic links are followed. A process that works
with a file or folder for longer holds a `claim` on it.
"""

import errno
import fcntl
import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pgolf.errors import InUseError, StorageError


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of a write to `path` into a StorageError that says what to do."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "no space left on the device: free some, or write to another place"
        elif e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "no permission to write there: choose another place"
        else:
            remedy = e.strerror or str(e)
        raise StorageError(f"cannot write {path}: {remedy}") from e


def writable_file(path: Path | str) -> Path:
    """The file that a write to `path` replaces: `path` with its links followed.

    Raises:
        StorageError: it is a folder or a device.
    """
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise StorageError(f"cannot write {path}: it is a folder; name a file in it")
    if real.exists() and not real.is_file():
        raise StorageError(f"cannot write {path}: it is a device or the like; name a file")
    return real


def _writable_folder(path: Path | str) -> Path:
    """The folder that a write to `path` replaces: `path` with its links followed.

    Raises:
        StorageError: it is the working directory or contains it, and so cannot be replaced.
    """
    real = Path(os.path.realpath(path))
    here = Path.cwd()
    if real == here or real in here.parents:
        raise StorageError(
            f"cannot write {path}: the folder that you are in would be replaced; name another one"
        )
    return real


# What says that a file system has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextmanager
def claim(path: Path | str, wait: bool = False) -> Iterator[Path]:
    """Keep `path`, a file or folder to be written, from all other processes while the block runs.

    `.NAME.lock` beside it is locked, and names process and host. The lock ends with its process,
    however that ends; a remaining lock file locks nothing. Half-written files that a killed process
    left beside `path` are removed. (If nothing can be created beside a folder, such as a mounted
    one, the lock file is in it.)

    Args:
        path: need not exist.
        wait: for the process that has it, after a message, instead of raising InUseError.

    Yields:
        `path` with its links followed.

    Raises:
        InUseError: another process has it; names it.
        StorageError: nothing can be written there.
    """
    real = Path(os.path.realpath(path))
    lock = real.with_name(f".{real.name or 'root'}.lock")
    if real.is_dir() and not os.access(real.parent, os.W_OK):
        lock = real / ".lock"
    with storage_errors(real):
        file = _locked(lock, path, wait)
    try:
        with storage_errors(real):
            os.truncate(file, 0)
            os.pwrite(file, f"{os.getpid()} {platform.node()}\n".encode(), 0)
            for remains in real.parent.iterdir():
                if _is_left(remains.name, real.name):
                    shutil.rmtree(remains) if remains.is_dir() else remains.unlink(missing_ok=True)
        yield real
    finally:
        with suppress(OSError):
            lock.unlink()
        with suppress(OSError):  # also for children that were forked and still hold the file
            fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


def _is_left(name: str, of: str) -> bool:
    """Whether a file or folder is the rest of an interrupted write of `of`: `.NAME.PID.tmp`.

    Not `.NAME.PID.old.tmp`, which may be the only copy.
    """
    inside = name.removeprefix(f".{of}.").removesuffix(".tmp")
    return name == f".{of}.{inside}.tmp" and inside.isdigit()


def _locked(lock: Path, path: Path | str, wait: bool) -> int:
    """The descriptor of the lock file, made if need be, once this process alone has it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    announced = False
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = f"{path} is in use by {_holder(file)}"
                if not wait:
                    raise InUseError(f"{holder}: choose another place, or wait for it") from None
                if not announced:
                    print(f"waiting: {holder}", file=sys.stderr, flush=True)
                announced = True
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as e:
                if e.errno not in _NO_LOCKS:
                    raise
                _refuse_if_alive(file, lock, path)
            # Whoever had it may have removed the file meanwhile: then this is nobody's lock.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(lock)):
                    return file
            os.close(file)
        except BaseException:
            os.close(file)
            raise


def _named(file: int) -> tuple[int, str] | None:
    """Process and host that a lock file names; None while it names none."""
    try:
        pid, host = os.pread(file, 1000, 0).decode().split(maxsplit=1)
        return int(pid), host.strip()
    except ValueError:
        return None


def _holder(file: int) -> str:
    """Who holds a lock, as part of a message."""
    pid, host = _named(file) or (0, "")
    if not pid:
        return "another process"
    return f"process {pid}" + ("" if host == platform.node() else f" on {host}")


def _refuse_if_alive(file: int, lock: Path, path: Path | str) -> None:
    """Without locks, decide by the process that the lock file names.

    Raises:
        InUseError: the process lives, or is on another host, where it cannot be looked for.
    """
    pid, host = _named(file) or (0, "")
    alive = False
    if pid and host == platform.node():
        with suppress(ProcessLookupError):
            os.kill(pid, 0)
            alive = True
    if alive or (pid and host != platform.node()):
        raise InUseError(
            f"{path} is in use by {_holder(file)}, and this file system has no locks: if that "
            f"process has ended, remove {lock}"
        )


def user_cache(name: str) -> Path:
    """The folder of what pgolf keeps for its next runs under a name, which may not be there yet."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "pgolf", name)


def _fsync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path | str, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Replace `path` by `content`: bytes, text, or a function that writes to the open file.

    Text is written as UTF-8; names of files that are not, with escapes in their place.

    Raises:
        StorageError: the file could not be written; what stood at `path` before is untouched.
    """
    path = writable_file(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as f:
                if callable(content):
                    content(f)
                else:
                    text = isinstance(content, str)
                    f.write(content.encode(errors="backslashreplace") if text else content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
            _fsync(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    An existing folder at `path` is replaced.

    Raises:
        StorageError: something in the block could not be written; `path` is as it was before.

    An old folder is moved aside and then removed: a kill between the two renames leaves it under a
    hidden name beside `path`.
    """
    path = _writable_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    with storage_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for item in (*temporary.rglob("*"), temporary):
                _fsync(item)
            if path.exists():
                os.replace(path, replaced)
            os.replace(temporary, path)
            _fsync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if replaced.exists() and not path.exists():  # the second rename failed
                os.replace(replaced, path)
            shutil.rmtree(replaced, ignore_errors=True)


def sha256_of(path: Path | str) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
