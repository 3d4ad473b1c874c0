"""Writing files so that a reader sees the old content or the new, never a half.

All that pgolf leaves on disk goes through `atomic_write` or `atomic_folder`; only metrics.jsonl
grows by lines, and resuming drops one that is not whole.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pgolf.errors import StorageError


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Say in words what stopped a write to `path`."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "no space left on the device: free some, or write elsewhere with out=PATH"
        elif e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "no permission to write there: choose another place with out=PATH"
        else:
            remedy = e.strerror or str(e)
        raise StorageError(f"cannot write {path}: {remedy}") from e


def _fsync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path | str, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Replace `path` by `content`: bytes, text, or a function that writes to the open file.

    Raises:
        StorageError: the file could not be written; what stood at `path` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as f:
                if callable(content):
                    content(f)
                else:
                    f.write(content.encode() if isinstance(content, str) else content)
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
    path = Path(path)
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
