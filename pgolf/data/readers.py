"""Documents out of text files, folders and JSON lines; nothing of the text is changed or left out.

- `.jsonl`: one document a line, its "text" field.
- any other file: UTF-8 text. Up to 16 KiB it is one document. A longer one, such as a book, is cut
  at line ends: after the first blank line past 4 KiB, or past 16 KiB at any line end. The documents
  one after another are the file, byte for byte.
- a folder: its .txt, .md and .jsonl files, at any depth, in the order of their paths.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from pgolf.errors import DataError

# In characters (in bytes for the whole-file rule): about one and four sequences of a small model.
SHORT, LONG = 4096, 16384
_SUFFIXES = (".txt", ".md", ".jsonl")


class Document(NamedTuple):
    """A text and where it stands, such as `book.txt:120`."""

    text: str
    where: str


class Source(Protocol):
    """Documents that can be iterated again and again, and about how many bytes they are."""

    size: int

    def __iter__(self) -> Iterator[Document]: ...


class TextSource:
    """The documents of files and folders, see the module's rules. Empty ones are left out.

    Raises:
        DataError: a path does not exist; when iterated: a file cannot be read, is not UTF-8 or
            not JSON lines, with file and line.
    """

    def __init__(self, paths: Iterable[Path | str]):
        self.files = text_files(paths)
        self.size = sum(file.stat().st_size for file in self.files)

    def __iter__(self) -> Iterator[Document]:
        for file in self.files:
            try:
                yield from _json_lines(file) if file.suffix == ".jsonl" else _text_file(file)
            except OSError as e:
                raise DataError(f"cannot read {file}: {e.strerror}") from e


def text_files(paths: Iterable[Path | str]) -> list[Path]:
    """The files behind files and folders, folders expanded.

    Raises:
        DataError: a path does not exist, or a folder has no text in it.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
            if not inside:
                raise DataError(f"no {', '.join(_SUFFIXES)} files in {path} or below it")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path} does not exist: give a text file, a .jsonl file or a folder")
    return files


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, line with its line end); a line of bytes is always whole characters in UTF-8."""
    with open(file, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                yield number, line.decode()
            except UnicodeDecodeError as e:
                raise DataError(
                    f"{file}:{number}: not UTF-8 text (byte 0x{line[e.start]:02x}): "
                    "convert the file, for example with iconv"
                ) from e


def _text_file(file: Path) -> Iterator[Document]:
    whole = file.stat().st_size <= LONG
    piece: list[str] = []
    size, first = 0, 1
    for number, line in _lines(file):
        for part in _short_parts(line):
            if not piece:
                first = number
            piece.append(part)
            size += len(part)
            if not whole and (size >= LONG or (size >= SHORT and not part.strip())):
                yield Document("".join(piece), f"{file}:{first}")
                piece, size = [], 0
    if piece:
        yield Document("".join(piece), f"{file}:{first}")


def _short_parts(line: str) -> Iterator[str]:
    """A line in parts of at most SHORT characters, cut after a space where there is one."""
    start = 0
    while len(line) - start > SHORT:
        end = line.rfind(" ", start, start + SHORT) + 1 or start + SHORT
        yield line[start:end]
        start = end
    yield line[start:]


def _json_lines(file: Path) -> Iterator[Document]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{where}: not JSON ({e}): expected one object a line") from e
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            found = f"keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
            raise DataError(f'{where}: expected an object with a string "text", found {found}')
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise DataError(
                f"{where}: half a surrogate pair in the text ({text[e.start]!a}) has no UTF-8 form"
            ) from e
        if text:
            yield Document(text, where)
