"""Minified modules in a file of the user's cache, for the next script of the same sources.

Minifying takes seconds of every run, and its result follows from the sources and the versions that
make the key. Whatever is wrong with the folder or a file costs these seconds again, nothing else.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress

from pgolf.errors import StorageError
from pgolf.files import atomic_write, user_cache

KEPT = 16  # files, of about 300 kB


def cached(key: str, make: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What `make` gave for a key earlier, by module, or what it gives now, which is then kept.

    Args:
        key: a hash of all that decides the result.
    """
    path = user_cache("scripts") / f"{key}.json"
    with suppress(OSError, ValueError):
        digest, _, body = path.read_text(encoding="utf-8").partition("\n")
        if digest == _digest(body):
            return json.loads(body)
    sources = make()
    body = json.dumps(sources)
    with suppress(OSError, StorageError):
        atomic_write(path, f"{_digest(body)}\n{body}")
        files = sorted(path.parent.glob("*.json"), key=lambda f: f.stat().st_mtime)
        for old in files[:-KEPT]:
            old.unlink(missing_ok=True)
    return sources


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
