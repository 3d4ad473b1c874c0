"""Files to read text from: which ones of a folder are read, the kind of each, and its bytes.

One table, `KINDS`, says what a suffix means, in any case; `.gz` may follow it. Compressed files and
Parquet are recognised by their first bytes; a file with an unknown suffix is JSON if it begins as
JSON objects do, else text.
"""

import codecs
import gzip
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pgolf.errors import DataError
from pgolf.files import storage_errors

TEXT, JSON, PARQUET = "text", "JSON", "Parquet"
KINDS = {
    ".txt": TEXT, ".text": TEXT, ".md": TEXT, ".markdown": TEXT,
    ".json": JSON, ".jsonl": JSON, ".ndjson": JSON,
    ".parquet": PARQUET,
}  # fmt: skip
STDIN = "-"

_GZIP_SUFFIX, _GZIP_MAGIC, _PARQUET_MAGIC = ".gz", b"\x1f\x8b", b"PAR1"
_BOM = "\ufeff"
_JSON_START = re.compile(rb'(?:\xef\xbb\xbf)?\s*\[?\s*\{\s*"(?:[^"\\\n]|\\.)*"\s*:')
# Bytes that are read at a time, more than a document that is kept whole.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Input:
    """One file to read, again and again.

    Attributes:
        name: its path, or what stands for it in messages.
        kind: TEXT, JSON or PARQUET.
        size: its bytes, uncompressed, for showing progress.
        open: opens it for reading from the beginning, uncompressed.
    """

    name: str
    kind: str
    size: int
    open: Callable[[], BinaryIO]

    @classmethod
    def of(cls, name: str, open_raw: Callable[[], BinaryIO]) -> "Input":
        """Look at a file's name and first bytes.

        Raises:
            DataError: it cannot be read, or is called Parquet and is not.
        """
        with _reading(name):
            with open_raw() as f:
                head = f.read(_BLOCK)
                size = f.seek(0, os.SEEK_END)
                if zipped := head.startswith(_GZIP_MAGIC):
                    f.seek(-4, os.SEEK_END)  # its size before compression, modulo 4 GiB
                    size = max(size, int.from_bytes(f.read(4), "little"))
            opener = (lambda: gzip.open(open_raw())) if zipped else open_raw
            if zipped:
                with opener() as f:
                    head = f.read(_BLOCK)
        kind = kind_by_name(name)
        if head.startswith(_PARQUET_MAGIC):
            kind = PARQUET
        elif kind == PARQUET:
            raise DataError(f"{name} is not a Parquet file: it does not begin with PAR1")
        elif kind is None:
            kind = JSON if _JSON_START.match(head) else TEXT
        return cls(name, kind, size, opener)


def kind_by_name(name: str) -> str | None:
    """The kind that a file's suffix stands for, None if it stands for none of `KINDS`."""
    return KINDS.get(os.path.splitext(name.lower().removesuffix(_GZIP_SUFFIX))[1])


def bare_name(path: str) -> str:
    """A file's or folder's name without suffixes, `stdin` for the standard input."""
    if path == STDIN:
        return "stdin"
    name = Path(path).resolve().name
    if name.lower().endswith(_GZIP_SUFFIX):
        name = name[: -len(_GZIP_SUFFIX)]
    return Path(name).stem


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn errors of reading the file `name` into DataErrors that say why."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{name}: damaged gzip file ({e}): get it again") from e
    except OSError as e:
        raise DataError(f"cannot read {name}: {e.strerror or e}") from e


def find_inputs(paths: Iterable[Path | str]) -> tuple[list[Input], dict[str, Counter[str]]]:
    """The files behind files, folders and `-` (the standard input), folders expanded.

    Returns:
        the files, those of a folder in the order of their paths, and for each folder how many of
        its files were left out, by kind.

    Raises:
        DataError: a path does not exist or cannot be read, or a folder has no text in it.
        StorageError: no space for what comes from the standard input.
    """
    inputs: list[Input] = []
    skipped: dict[str, Counter[str]] = {}
    for path in map(Path, paths):
        if str(path) == STDIN:
            inputs.append(_standard_input())
        elif path.is_dir():
            files, left_out = _inside(path)
            if left_out:
                skipped[str(path)] = left_out
            if not files:
                raise DataError(
                    f"no {', '.join(KINDS)} files in {path} or below it (also with {_GZIP_SUFFIX} "
                    f"behind), there {'are ' + tally(left_out) if left_out else 'is nothing'}: "
                    "name the files themselves, or another folder"
                )
            inputs += [_file(file) for file in files]
        elif path.is_file():
            inputs.append(_file(path))
        elif path.exists():  # a pipe, such as the shell's <(...)
            with _reading(str(path)), open(path, "rb") as f:
                inputs.append(_kept(str(path), f))
        else:
            raise DataError(f"{path} does not exist: give a text file, a .jsonl file or a folder")
    return inputs, skipped


def tally(counts: Counter[str]) -> str:
    """`3 .py, 1 hidden`: the most frequent first."""
    return ", ".join(
        f"{n} {what}" for what, n in sorted(counts.items(), key=lambda c: (-c[1], c[0]))
    )


def _file(path: Path) -> Input:
    return Input.of(str(path), lambda: open(path, "rb"))


def _inside(folder: Path) -> tuple[list[Path], Counter[str]]:
    """A folder's files of a known kind, at any depth, by path, and how many others there are."""

    def stop(e: OSError) -> None:
        raise DataError(f"cannot read {e.filename}: {e.strerror}") from e

    files: list[Path] = []
    left_out: Counter[str] = Counter()
    for place, folders, names in os.walk(folder, onerror=stop):
        left_out["hidden"] += sum(name.startswith(".") for name in folders + names)
        # a hidden folder counts as one and is not looked into
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            if name.startswith("."):
                continue
            if not path.is_file():
                left_out["broken links or devices"] += 1
            elif kind_by_name(name):
                files.append(path)
            else:
                left_out[path.suffix.lower() or "without a suffix"] += 1
    return sorted(files), +left_out


def _standard_input() -> Input:
    if sys.stdin.isatty():
        raise DataError(
            f"{STDIN} reads the text from the standard input, which is a terminal: pipe it in, as "
            "in `cat notes.txt | pgolf data prepare --text - --out data/notes`"
        )
    return _kept("standard input", sys.stdin.buffer)


def _kept(name: str, stream: BinaryIO) -> Input:
    """A stream, kept in a temporary file without a name: text is read more than once."""
    with storage_errors(Path(tempfile.gettempdir())):
        spool = tempfile.TemporaryFile()
        shutil.copyfileobj(stream, spool, _BLOCK)
        spool.flush()

    def open_raw() -> BinaryIO:
        file = os.fdopen(os.dup(spool.fileno()), "rb")
        file.seek(0)
        return file

    return Input.of(name, open_raw)


def decoded(source: Input) -> Iterator[str]:
    """A file's text in blocks of about a MiB, without a byte order mark at its beginning.

    Raises:
        DataError: it cannot be read or is not UTF-8; names the line.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines, first = 1, True
    with _reading(source.name), source.open() as f:
        while True:
            raw = f.read(_BLOCK)
            try:
                block = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as e:
                number = lines + e.object[: e.start].count(b"\n")
                raise DataError(
                    f"{source.name}:{number}: not UTF-8 text (byte 0x{e.object[e.start]:02x}): "
                    "convert the file, for example with iconv"
                ) from e
            lines += block.count("\n")
            if block:
                yield block.removeprefix(_BOM) if first else block
                first = False
            if not raw:
                return
