"""Recognises files of other programs by their first bytes, and says how to import their weights.

Public scripts of the contest write two files: `final_model.pt` (torch.save), and the quantised
model, also torch.save but compressed. Brotli's files have no mark to recognise them by.
"""

import io
import lzma
import zlib
from pathlib import Path

from pgolf.errors import ArtifactError

OURS = b"PGOLF"
ZIP, PICKLE = b"PK\x03\x04", b"\x80\x02"
HEAD_BYTES = 1 << 16  # enough of a file, or of what a compressed one holds, to recognise it by
IMPORT_HINT = (
    "`pgolf import FILE --recipe NAME --out RUN` makes a run folder with an artifact of it"
)


def compressor(data: bytes) -> str:
    """The compressor that the first bytes name; '' for none."""
    if data[:1] == b"\x78" and len(data) > 1 and int.from_bytes(data[:2], "big") % 31 == 0:
        return "zlib"
    marks = {b"\xfd7zXZ\0": "lzma", b"\x5d\0\0": "lzma", b"\x28\xb5\x2f\xfd": "zstd"}
    return next((name for mark, name in marks.items() if data.startswith(mark)), "")


def decompress(data: bytes, limit: int) -> bytes:
    """At most `limit` bytes of what a compressed file holds; of the file itself if it is none.

    Raises:
        ArtifactError: it is damaged.
    """
    name, errors = compressor(data), (zlib.error, lzma.LZMAError)
    if name == "zstd":
        import zstandard  # scoring loads this module, and needs no zstandard

        errors = (zstandard.ZstdError,)
    try:
        if name == "zlib":
            return zlib.decompressobj().decompress(data, limit)
        if name == "lzma":
            return lzma.LZMADecompressor().decompress(data, limit)
        if name == "zstd":
            return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read(limit)
    except errors as e:
        raise ArtifactError(f"compressed with {name} and damaged ({e})") from e
    return data[:limit]


def is_safetensors(data: bytes) -> bool:
    """Whether it begins as a safetensors file: the length of its JSON header, and the header."""
    return data[8:9] == b"{" and 2 <= int.from_bytes(data[:8], "little") <= 100 << 20


def kind(data: bytes) -> str:
    """What the first bytes say of a file: 'artifact', 'torch', 'raw', 'safetensors', '' if unknown.

    'raw' is PR 478's layout: the length of a JSON header in four bytes, compressed.
    """
    if data.startswith(OURS):
        return "artifact"
    if is_safetensors(data):
        return "safetensors"
    try:
        content = decompress(data, HEAD_BYTES)
    except ArtifactError:
        return ""
    if content.startswith(PICKLE) or (content.startswith(ZIP) and b"data.pkl" in content):
        return "torch"
    return "raw" if compressor(data) and content[4:5] == b"{" else ""


def explain(data: bytes) -> str:
    """What a file given as an artifact or a run folder really is, and what to do with it."""
    compression = compressor(data)
    file_kind = kind(data)
    if file_kind == "artifact":
        return "an artifact"
    if file_kind == "safetensors":
        return f"a safetensors file: {IMPORT_HINT}"
    if file_kind == "torch":
        of = ", the quantised model of a public script" if compression else ", as final_model.pt is"
        way = f" compressed with {compression}" if compression else ""
        return f"a file of torch.save{way}{of}: {IMPORT_HINT}"
    if file_kind == "raw":
        return (
            f"compressed with {compression}, in the layout of PR 478's script, which pgolf does "
            "not read: import the final_model.pt that lies beside it"
        )
    if compression:
        return f"compressed with {compression}, and what it holds is unknown"
    return "unknown"


def refuse_foreign(path: Path) -> None:
    """Raise ArtifactError if `path` is a file of a kind that is known and no artifact."""
    with open(path, "rb") as f:
        data = f.read(HEAD_BYTES)
    if compressor(data) or kind(data) not in ("artifact", ""):
        raise ArtifactError(f"{path} is not an artifact but {explain(data)}")
