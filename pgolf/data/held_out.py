"""Finds held-out documents in training shards, by their hashes.

A document is BOS and what follows up to the next BOS, over the shards of a split end to end. Two
are the same if their tokens are. Those of fewer than LEAST tokens, BOS included, do not count: a
headline or a greeting naturally occurs in both splits.

`pgolf data prepare` writes val_documents.bin, which the manifest names: a record of 24 bytes for
each different document of the validation shards, in the order of their bytes:

    lead    uint64, little-endian: the document's tokens 1, 2 and 3, the lowest bits first, 16 bits
            each, and the number of its tokens modulo 65,536
    digest  BLAKE2b of 16 bytes over its tokens, uint16, little-endian, BOS included

Of shards without that file, such as the contest's, the records are made when they are needed.

Training looks for them in all shards before its first step, and once: held_out.json beside the
shards keeps the result until the size or time of a file changes. A thread that reads batches could
not look for them: it sees pieces of documents. Only a document with the lead of a held-out one is
hashed, so the rest costs as much as finding BOS (NOTES.md has figures and the command).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf.data.contest import read_json
from pgolf.data.manifest import Dataset
from pgolf.data.shards import BOS_ID, open_shard, read_header
from pgolf.errors import DataError, StorageError
from pgolf.files import atomic_write, sha256_of
from pgolf.progress import Progress

LEAST = 16  # tokens
FILE, RESULT = "val_documents.bin", "held_out.json"
VERSION = 1  # of both
RECORD = np.dtype([("lead", "<u8"), ("digest", "V16")])
_STEP = 1 << 24  # tokens that are looked at together


@dataclass
class Place:
    """A document of shards.

    Attributes:
        shard: where it begins.
        position: of its BOS there.
        parts: its tokens; those of several shards if it runs on into others.
    """

    shard: Path
    position: int
    parts: list[np.ndarray]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def record(self) -> bytes:
        """As in the file."""
        digest = hashlib.blake2b(digest_size=16)
        for part in self.parts:
            digest.update(part.tobytes())
        first = np.concatenate([part[:4] for part in self.parts])
        lead = _leads(first, np.zeros(1, np.int64), np.array([self.size]))
        return lead.astype("<u8").tobytes() + digest.digest()


def documents(
    shards: Sequence[Path],
    leads: np.ndarray | None = None,
    seen: Callable[[int], object] = lambda tokens: None,
) -> Iterator[Place]:
    """The documents of a split that count.

    Args:
        leads: of those to look for; others with such a lead, or on a shard's border, come too.
        seen: called with the number of tokens passed.
    """
    last = None
    for shard in shards:
        tokens = open_shard(shard, None)
        steps = range(0, tokens.size, _STEP)
        starts = np.concatenate(
            [at + np.flatnonzero(tokens[at : at + _STEP] == BOS_ID) for at in steps]
        )
        if last:
            last.parts.append(tokens[: starts[0] if starts.size else None])
        if starts.size:
            if last and last.size >= LEAST:
                yield last
            last = Place(shard, int(starts[-1]), [tokens[starts[-1] :]])
            sizes = np.diff(starts)
            starts, sizes = starts[:-1][sizes >= LEAST], sizes[sizes >= LEAST]
            if leads is not None:
                candidates = np.isin(_leads(tokens, starts, sizes), leads)
                starts, sizes = starts[candidates], sizes[candidates]
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
                yield Place(shard, start, [tokens[start : start + size]])
        seen(tokens.size)
    if last and last.size >= LEAST:
        yield last


def _leads(tokens: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Of documents (n,), uint64."""
    leads = (sizes & 0xFFFF).astype(np.uint64) << np.uint64(48)
    for i in range(3):
        leads |= tokens[starts + i + 1].astype(np.uint64) << np.uint64(16 * i)
    return leads


def records(shards: Sequence[Path]) -> bytes:
    """Those of validation shards, as in the file."""
    return b"".join(sorted({place.record for place in documents(shards)}))


def write_records(folder: Path, shards: Sequence[Path]) -> dict[str, Any]:
    """Into a folder that is being prepared; what its manifest says of the file."""
    data = records(shards)
    atomic_write(folder / FILE, data)
    stated = {"file": FILE, "version": VERSION, "documents": len(data) // RECORD.itemsize}
    return stated | {"sha256": hashlib.sha256(data).hexdigest()}


def found_in(shards: Sequence[Path], held_out: bytes, label: str = "") -> Iterator[Place]:
    """The documents of training shards that have one of these records.

    Args:
        label: of the progress line; '' shows none.
    """
    size = RECORD.itemsize
    known = {held_out[at : at + size] for at in range(0, len(held_out), size)}
    leads = np.frombuffer(held_out, RECORD)["lead"]
    total = sum(map(read_header, shards))
    with Progress(label, total, "tokens", enabled=bool(label)) as bar:
        for place in documents(shards, leads, bar.update):
            if place.record in known:
                yield place


def check_held_out(dataset: Dataset, allow: bool = False, again: bool = False) -> str:
    """Look for held-out documents in the training shards, unless a result is known.

    Args:
        allow: a match is no error.
        again: look even if a result is known, and check the file of records, too.

    Returns:
        A message that names the first match, '' if there is none.

    Raises:
        DataError: a shard holds one, or the file of records is not that of the shards.
    """
    stated = (dataset.manifest or {}).get("held_out")
    if stated and stated.get("version") != VERSION:
        stated = None
    shards = [*dataset.train_shards, *dataset.val_shards]
    kept, now = dataset.folder / RESULT, _identity(shards, stated)
    before = {} if again else _kept(kept)
    if before.get("files") == now:
        problem = str(before.get("problem"))
    else:
        problem = _problem(dataset, _records_of(dataset, stated, again))
        entry = {"version": VERSION, "files": now, "problem": problem}
        with suppress(StorageError):  # it saves time, no more: shards may lie where nobody writes
            atomic_write(kept, json.dumps(entry, indent=1) + "\n")
    if problem and not allow:
        raise DataError(
            f"{problem}: what is held out is not to be trained on. Leave the shard out, prepare "
            "the text again without it, or train with held_out=allow"
        )
    return problem


def _problem(dataset: Dataset, held_out: bytes) -> str:
    """A message that names the first held-out document in the training shards; '' if none."""
    matches = list(found_in(dataset.train_shards, held_out, "looking for held-out documents"))
    if not matches:
        return ""
    first, total = matches[0], sum(place.size for place in matches)
    return (
        f"{first.shard}: the document of {first.size} tokens at position {first.position} is one "
        f"of {dataset.val_shards[0].name.rpartition('_')[0]}_* too (documents held out and "
        f"trained on: {len(matches):,}, of {total:,} tokens)"
    )


def _records_of(dataset: Dataset, stated: dict[str, Any] | None, again: bool) -> bytes:
    """The file's, or made of the validation shards."""
    made = records(dataset.val_shards) if again or not stated else b""
    if not stated:
        return made
    file = dataset.folder / FILE
    try:
        data = file.read_bytes()
    except OSError as e:
        raise DataError(
            f"cannot read {file} ({e.strerror}), which the manifest names: prepare the folder again"
        ) from e
    if sha256_of(file) != stated.get("sha256") or (again and data != made):
        raise DataError(
            f"{file} is not that of the validation shards as they were made: prepare the folder "
            "again"
        )
    return data


def _identity(shards: Sequence[Path], stated: dict[str, Any] | None) -> str:
    """A hash of names, sizes, times of change, and what is stated of the records."""
    stats = [(shard.name, s.st_size, s.st_mtime_ns) for shard in shards if (s := shard.stat())]
    return hashlib.sha256(json.dumps([stats, stated]).encode()).hexdigest()


def _kept(file: Path) -> dict[str, Any]:
    """The known result; {} if none can be read."""
    with suppress(DataError):
        cached = read_json(file) or {}
        return cached if cached.get("version") == VERSION else {}
    return {}
