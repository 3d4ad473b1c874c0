"""Codecs of the artifact, one module each; a module is imported when it is used.

The general ones take and give bytes:

    compress(data: bytes, level: int) -> bytes
    decompress(data: bytes | memoryview, size: int) -> bytearray

`size` is what the file declares. `decompress` returns exactly this many bytes or raises
ArtifactError, and never holds more than a small multiple of `size`.

`rans` is the entropy coder for codes of weights. It takes int8 matrices, each with the number of a
group: matrices of a group are expected to be alike. Its encoder is the module `rans_encode`, so
that decoding does not load it. A general codec beside it packs everything else.
"""

from importlib import import_module
from types import ModuleType

from pgolf.errors import ConfigError

CODECS = {"zstd": 1, "lzma": 2, "brotli": 3, "rans": 4}  # name -> id in files, for ever
GENERAL = ("zstd", "lzma", "brotli")


def body_codec(name: str) -> str:
    """The general codec of a file whose codec is `name`.

    With rans it is lzma: of what little is no code, brotli would save a hundred bytes, and decoding
    would need a package more.
    """
    return "lzma" if name == "rans" else name


def codec(name: str) -> ModuleType:
    """The module of the codec `name`.

    Raises:
        ConfigError: the library that it needs is not installed.
    """
    try:
        return import_module(f"pgolf.codecs.{name}")
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"codec {name} needs the library {e.name}: pip install {e.name} (to pack, codec=rans "
            "or codec=lzma needs none)"
        ) from e
