"""Documents from files, folders and the standard input, with their text unchanged.

Only a byte order mark at the beginning of a file is left out.

- JSON lines (.jsonl, .ndjson), a JSON array (.json), Parquet: one document per record, from its
  "text" field or a given one.
- any other file: UTF-8 text. Up to 16 KiB it is one document. A longer one, such as a book, is cut
  at line ends: after the first blank line past 4 KiB, or past 16 KiB at any line end. The documents
  one after another are the file, byte for byte.
- a folder: its files of a known kind (`pgolf.data.inputs.KINDS`), at any depth, in the order of
  their paths; hidden ones and others are counted in `skipped`.
- each of them also compressed by gzip.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from pgolf.data.inputs import JSON, PARQUET, TEXT, Input, decoded, find_inputs
from pgolf.data.records import import_parquet, json_records, parquet_records, text_of
from pgolf.errors import ConfigError

FIELD = "text"
# In characters (in bytes for the whole-file rule): about one and four sequences of a small model.
SHORT, LONG = 4096, 16384


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

    Args:
        paths: files, folders, or `-` for the standard input.
        field: what holds the text of a record; default: FIELD.

    Attributes:
        inputs: the files.
        skipped: for each folder, how many of its files are not read, by kind.

    Raises:
        DataError: a path does not exist, or pyarrow is missing for a Parquet file; when iterated:
            a file cannot be read, is not UTF-8 or not what its kind says, with file and line.
        ConfigError: a field is named, and no file has fields.
    """

    def __init__(self, paths: Iterable[Path | str], field: str | None = None):
        self.inputs, self.skipped = find_inputs(paths)
        self.size = sum(source.size for source in self.inputs)
        self.field = field or FIELD
        kinds = {source.kind for source in self.inputs}
        if PARQUET in kinds:
            import_parquet()
        if field and kinds == {TEXT}:
            raise ConfigError(
                f"--field {field} is for JSON and Parquet, and all that is read here is plain "
                "text: leave it out, or give the file a suffix such as .jsonl"
            )

    def __iter__(self) -> Iterator[Document]:
        for source in self.inputs:
            yield from _documents(source, self.field)


def _documents(source: Input, field: str) -> Iterator[Document]:
    if source.kind == TEXT:
        yield from _cut(source)
        return
    records = json_records(source) if source.kind == JSON else parquet_records(source, field)
    for record, where in records:
        if text := text_of(record, where, field):
            yield Document(text, where)


def _cut(source: Input) -> Iterator[Document]:
    """The documents of a text file."""
    piece: list[str] = []
    size, first, whole = 0, 1, True
    for number, part, whole in _parts(decoded(source)):
        if not piece:
            first = number
        piece.append(part)
        size += len(part)
        if not whole and (size >= LONG or (size >= SHORT and not part.strip())):
            yield Document("".join(piece), f"{source.name}:{first}")
            piece, size = [], 0
    if piece:
        yield Document("".join(piece), f"{source.name}:{first}")


def _parts(blocks: Iterator[str]) -> Iterator[tuple[int, str, bool]]:
    """(line number, line with its line end, whether the whole file is one document).

    A line longer than SHORT characters comes in parts, cut after a space where there is one, so
    that no line is ever held as a whole.
    """
    rest, number, whole = "", 1, None
    for block in blocks:
        if whole is None:
            # a block is longer than that unless it is all there is
            whole = len(block.encode()) <= LONG
        rest += block
        start = 0
        while True:
            newline = rest.find("\n", start, start + SHORT)
            if newline >= 0:
                end = newline + 1
            elif len(rest) - start > SHORT:
                end = rest.rfind(" ", start, start + SHORT) + 1 or start + SHORT
            else:
                break
            yield number, rest[start:end], whole
            number += newline >= 0
            start = end
        rest = rest[start:]
    if rest:
        yield number, rest, bool(whole)
