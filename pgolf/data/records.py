"""Records that carry documents: JSON (an array, or values one after another) and Parquet.

A record is an object with the text in one of its fields; in JSON it may be the text itself.
"""

import json
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from pgolf.data.inputs import Input, decoded
from pgolf.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
# An error this near to the end of what was read so far may only mean that there is more to read:
# longer than any literal or escape that can be cut.
_CUT = 16
_BATCH_ROWS = 256


def json_records(source: Input) -> Iterator[tuple[Any, str]]:
    """The values of a JSON file and where each stands: lines, or the elements of one array.

    Only the value at hand is in memory.

    Raises:
        DataError: not JSON, or not readable; names file and line.
    """
    values = _Values(source)
    array = values.peek() == "["
    if array:
        values.step()
        if values.peek() == "]":
            values.step()
            array = False
    while array or values.peek():
        yield values.take()
        if array:
            sign = values.peek()
            if sign not in (",", "]"):
                raise values.error("expected ',' or ']' behind an element of the array")
            values.step()
            array = sign == ","
            if not array and values.peek():
                raise values.error("there is more behind the array's end")


class _Values:
    """What was read of a JSON file and not taken yet: `text` from `at`, in line `line`."""

    def __init__(self, source: Input):
        self.name, self.blocks = source.name, decoded(source)
        self.text, self.at, self.line = "", 0, 1
        self.decoder = json.JSONDecoder()

    def error(self, what: str) -> DataError:
        return DataError(
            f"{self.name}:{self.line}: not JSON ({what}): expected objects, one a line or in an "
            "array"
        )

    def step(self, to: int | None = None) -> None:
        """Leave behind what stands before `to`; by default one character."""
        to = self.at + 1 if to is None else to
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def peek(self) -> str:
        """The next character that is no white space, '' at the end."""
        while True:
            self.step(_SPACE.match(self.text, self.at).end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def take(self) -> tuple[Any, str]:
        """The next value and where it stands."""
        self.peek()
        where = f"{self.name}:{self.line}"
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except RecursionError as e:
                raise self.error("nested too deep") from e
            except json.JSONDecodeError as e:
                cut = e.msg.startswith("Unterminated") or e.pos >= len(self.text) - _CUT
                if cut and self._read_on():
                    continue
                raise self.error(e.msg) from e
            self.step(end)
            return value, where

    def _read_on(self) -> bool:
        """Read at least as much as waits already, so that a long value is not parsed too often."""
        parts = [self.text[self.at :]]
        waiting, read = len(parts[0]), 0
        while block := next(self.blocks, ""):
            parts.append(block)
            read += len(block)
            if read >= waiting:
                break
        self.text, self.at = "".join(parts), 0
        return read > 0


def import_parquet() -> ModuleType:
    """pyarrow's module for Parquet.

    Raises:
        DataError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise DataError("reading Parquet needs pyarrow: pip install 'pgolf[parquet]'") from e
    return pyarrow.parquet


def parquet_records(source: Input, field: str) -> Iterator[tuple[Any, str]]:
    """The rows of a Parquet file, each with its column `field` alone, and where each stands.

    Raises:
        DataError: pyarrow is missing, the file is damaged, or has no such column.
    """
    parquet = import_parquet()
    row = 0
    with source.open() as f:
        try:
            table = parquet.ParquetFile(f)
            columns = table.schema_arrow.names
            if field not in columns:
                raise DataError(
                    f"{source.name}: no column {field!r}, there are {columns}: name one with "
                    "--field"
                )
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield {field: value}, f"{source.name}:row {row}"
        except (ValueError, OSError) as e:  # ArrowInvalid is the one, ArrowIOError the other
            raise DataError(f"{source.name} cannot be read as Parquet ({e}): get it again") from e


def text_of(record: Any, where: str, field: str) -> str:
    """The text of a record.

    Raises:
        DataError: it has none in `field`, or one that has no UTF-8 form.
    """
    text = record.get(field) if isinstance(record, dict) else record
    if not isinstance(text, str):
        if not isinstance(record, dict):
            content = type(record).__name__
        elif field in record:
            content = f"{type(text).__name__} there"
        else:
            content = f"keys {sorted(record)}"
        raise DataError(
            f'{where}: expected an object with a string "{field}", found {content}: name another '
            "field with --field, or leave the file out"
        )
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            f"{where}: half a surrogate pair in the text ({text[e.start]!a}) has no UTF-8 form"
        ) from e
    return text
