"""Codecs of the artifact: one module each, with the same two functions.

    compress(data: bytes, level: int) -> bytes
    decompress(data: bytes, size: int) -> bytes

`size` is what the file declares. `decompress` returns exactly so many bytes or raises
ArtifactError, and at no time holds more than a small multiple of `size`. A module is imported when
it is used: decoding loads one. An entropy coder joins by a module and a line in the table.
"""

from importlib import import_module
from types import ModuleType

CODECS = {"zstd": 1, "lzma": 2}  # name -> id in the file; ids are never used again


def codec(name: str) -> ModuleType:
    """The module of the codec `name`."""
    return import_module(f"pgolf.codecs.{name}")
