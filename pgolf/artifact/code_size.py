"""The size of code, as it counts against the limit of code + model."""

import lzma
import os
from collections.abc import Iterable
from pathlib import Path


def code_bytes(files: Iterable[Path]) -> int:
    """Compressed size of exactly these files, each once.

    They are joined as name, length and content, sorted by name, and compressed with lzma's best
    preset. Names are relative to the files' common folder, so the size is the same on any machine.

    Raises:
        OSError: a file can't be read.
    """
    paths = {file.resolve() for file in files}
    if not paths:
        return 0
    root = os.path.commonpath([path.parent for path in paths])
    joined = bytearray()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        content = path.read_bytes()
        joined += b"%s\n%d\n%s" % (name.encode(), len(content), content)
    return len(lzma.compress(bytes(joined), preset=9 | lzma.PRESET_EXTREME))
