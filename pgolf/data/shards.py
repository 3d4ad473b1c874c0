"""Token shards in the contest's format: 256 little-endian int32 of header, then uint16 tokens.

header[0] = 20240520, header[1] = 1, header[2] = N, the rest 0; the file has 1024 + 2 N bytes.
N = tokens of a shard. Documents follow one another, each led by BOS (id 1); there is no EOS.
"""

import re
from pathlib import Path

import numpy as np

from pgolf.errors import DataError
from pgolf.files import atomic_write

MAGIC, VERSION = 20240520, 1
HEADER_INTS, HEADER_BYTES = 256, 1024
BOS_ID = 1

_HOW_TO_MAKE = (
    "make shards with `pgolf data prepare --text FILE --out FOLDER` "
    "or `pgolf data fetch --variant sp1024`"
)
_REPLACE = "the file is damaged or no token shard: fetch or prepare it again"


def write_shard(path: Path | str, tokens: np.ndarray) -> None:
    """Write `tokens` (1-D, any integer type, values 0..65535) as one shard.

    Raises:
        DataError: no tokens, or values that do not fit uint16.
        StorageError: the file could not be written.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"{path}: a shard needs a 1-D integer array with at least one token, "
            f"got shape {tokens.shape} of {tokens.dtype}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > 65535:
        raise DataError(f"{path}: token {low if low < 0 else high} does not fit 0..65535 (uint16)")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    body = np.ascontiguousarray(tokens, "<u2")

    def write(file) -> None:
        file.write(header.tobytes())
        file.write(body.data)

    atomic_write(path, write)


def read_header(path: Path | str) -> int:
    """Check a shard's header against its file size and return its number of tokens.

    Raises:
        DataError: names what the file holds, what was expected and the remedy, in one line.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
    except OSError as e:
        raise DataError(f"cannot read shard {path} ({e.strerror}); {_HOW_TO_MAKE}") from e
    if len(raw) < HEADER_BYTES:
        raise DataError(f"{path}: {size} bytes, expected a header of {HEADER_BYTES}; {_REPLACE}")
    magic, version, count = (int(x) for x in np.frombuffer(raw, "<i4", 3))
    if magic != MAGIC:
        raise DataError(f"{path}: magic number {magic}, expected {MAGIC}; {_REPLACE}")
    if version != VERSION:
        raise DataError(f"{path}: shard version {version}, expected {VERSION}; {_REPLACE}")
    if count < 1:
        raise DataError(f"{path}: {count} tokens declared, expected 1 or more; {_REPLACE}")
    if size != HEADER_BYTES + 2 * count:
        raise DataError(
            f"{path}: {size} bytes, expected {HEADER_BYTES + 2 * count} for the {count} tokens "
            f"that its header declares; {_REPLACE}"
        )
    return count


def open_shard(path: Path | str, vocab_size: int | None) -> np.ndarray:
    """Memory-map a shard's tokens, uint16 of shape (N,), after checking its header and its size.

    Args:
        path: the shard.
        vocab_size: every token must be smaller, and all are read for it; None: they are not.

    Raises:
        DataError: the header, the size or a token is wrong.
    """
    count = read_header(path)
    tokens = np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size is not None:
        step = 1 << 24
        for start in range(0, count, step):
            check_tokens(path, tokens[start : start + step], start, vocab_size)
    return tokens


def check_tokens(path: Path | str, piece: np.ndarray, start: int, vocab_size: int) -> None:
    """Raise DataError if a token of this piece, which begins at `start`, is not in a vocabulary."""
    if int(piece.max()) >= vocab_size:
        at = int(np.argmax(piece >= vocab_size))
        raise DataError(
            f"{path}: token {int(piece[at])} at position {start + at}, expected less than the "
            f"vocabulary size {vocab_size}; the shard was made with another tokenizer: use the one "
            "that lies with it"
        )


def check_documents(rows: np.ndarray, most: int, bos: int = BOS_ID) -> None:
    """Raise DataError if a sequence of these (N, T) has more than `most` documents."""
    count = 1 + int((rows[:, 1:] == bos).sum(1).max())
    if count > most:
        raise DataError(
            f"a sequence of {rows.shape[1]} tokens holds {count} documents, and this attention has "
            f"room for {most}: use attention=sdpa, which has for any, or documents=false"
        )


def find_shards(folder: Path | str, split: str) -> list[Path]:
    """The shards `NAME_{split}_NUMBER.bin` of a folder, in the order of their numbers.

    Raises:
        DataError: no folder, no shards, shards of two data sets, or a number left out.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, expected a folder of shards" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}; {_HOW_TO_MAKE}")
    name = re.compile(rf"(.+)_{re.escape(split)}_(\d+)\.bin")
    shards = sorted((m[1], int(m[2]), p) for p in folder.iterdir() if (m := name.fullmatch(p.name)))
    if not shards:
        raise DataError(f"no shards *_{split}_*.bin in {folder}; {_HOW_TO_MAKE}")
    first, number, _ = shards[0]
    for i, (stem, n, path) in enumerate(shards):
        if stem != first:
            raise DataError(
                f"{folder} mixes the shards of {first!r} and {stem!r}: keep one data set a folder"
            )
        if n != number + i:
            raise DataError(
                f"{folder}: shard {number + i} of {first!r} ({split}) is missing before "
                f"{path.name}; fetch or prepare the folder again"
            )
    return [path for _, _, path in shards]


def load_validation(
    folder: Path | str, vocab_size: int, seq_len: int, max_tokens: int = 0
) -> np.ndarray:
    """All validation tokens, uint16 of shape (k seq_len + 1,): k whole sequences and a last target.

    Args:
        folder: holds the `*_val_*.bin` shards, which are read in order.
        vocab_size: every token must be smaller.
        seq_len: tokens of a sequence.
        max_tokens: use at most this many targets; 0 uses all.

    Raises:
        DataError: missing or damaged shards, or not one whole sequence in them.
    """
    shards = find_shards(folder, "val")
    tokens = np.concatenate([open_shard(path, vocab_size) for path in shards])
    targets = min(tokens.size - 1, max_tokens or tokens.size)
    usable = targets // seq_len * seq_len
    if usable <= 0:
        limit = f" (max_tokens={max_tokens})" if max_tokens else ""
        raise DataError(
            f"{folder}: {tokens.size} validation tokens{limit}, expected at least {seq_len + 1} "
            f"for one sequence of {seq_len}: prepare more text or use a shorter sequence"
        )
    return tokens[: usable + 1]
