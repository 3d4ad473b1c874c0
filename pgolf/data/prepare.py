"""Text to a folder of shards: split by hash, train the tokenizer, encode, check every byte.

The documents are read three times (count, sample for the tokenizer, encode), so that the text need
not fit into memory. A document goes to validation if the hash of its text is below the fraction. So
the split does not depend on the order, and equal documents go to the same split. The same hash
orders the documents of a shard, a fixed shuffle.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pgolf.data.contest import MANIFEST
from pgolf.data.encode import Encoder, ShardWriter, SplitStats, count_written
from pgolf.data.held_out import FILE, RESULT, found_in, write_records
from pgolf.data.manifest import (
    KIND,
    SPLITS,
    TOKENIZER,
    VERSION,
    Dataset,
    check_tokenizer,
    read_manifest,
)
from pgolf.data.readers import LONG, Document, Source
from pgolf.data.tokenizer import TRAIN_BYTES, check_vocab_size, load_tokenizer, train_tokenizer
from pgolf.errors import ConfigError, DataError
from pgolf.files import atomic_folder, atomic_write, claim, sha256_of
from pgolf.progress import Progress
from pgolf.scoring.bpb import changed_by

SHARD_TOKENS = 100_000_000
VAL_FRACTION = 0.1
VOCAB_SIZE = 1024
_BATCH_BYTES = 1 << 20


def prepare(
    source: Source,
    out: Path | str,
    corpus: str,
    *,
    license: str = "unknown",
    note: str = "",
    vocab_size: int = VOCAB_SIZE,
    tokenizer: Path | str | None = None,
    val_fraction: float = VAL_FRACTION,
    shard_tokens: int = SHARD_TOKENS,
    replace: Literal["same", "prepared", "anything"] = "same",
) -> Dataset:
    """Write the shards, the tokenizer and the manifest of a corpus into the folder `out`.

    Args:
        source: the documents, the same ones whenever it is iterated.
        out: the folder; it appears when everything in it is complete and checked.
        corpus: id of the text, also the first part of the shards' names.
        license: of the text, for the manifest.
        note: one more sentence for the manifest.
        vocab_size: pieces of the tokenizer to be trained on the training documents.
        tokenizer: an existing SentencePiece model to use instead.
        val_fraction: share of the documents that are held out.
        shard_tokens: tokens of a shard; the last one of a split is shorter.
        replace: what may lie at `out` and is replaced: a folder prepared from the same corpus, any
            prepared folder, or anything, after waiting for a process that writes there.

    Raises:
        ConfigError: a value out of range, or an `out` that may not be replaced.
        DataError: unusable text or tokenizer; names the document or file.
        StorageError: something could not be written.
    """
    out = Path(out)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", corpus):
        raise ConfigError(f"corpus name {corpus!r}: use letters, digits, '.', '_' and '-' only")
    if not 0.0 < val_fraction < 1.0:
        raise ConfigError(f"validation fraction {val_fraction} is not between 0 and 1")
    if shard_tokens < 1:
        raise ConfigError(f"{shard_tokens} tokens a shard, expected 1 or more")
    if tokenizer:
        check_tokenizer(load_tokenizer(tokenizer), Path(tokenizer))
    else:
        check_vocab_size(vocab_size)
    with claim(out, wait=replace == "anything"):
        old = None if replace == "anything" else _prepared_before(out)
        if old and replace == "same":
            _refuse_another(out, old, corpus, old["text_sha256"])
        seen, text_sha256 = _count(source, val_fraction)
        if old and replace == "same":
            _refuse_another(out, old, corpus, text_sha256)
        with atomic_folder(out) as folder:
            model = folder / TOKENIZER
            if tokenizer:
                atomic_write(model, Path(tokenizer).read_bytes())
            else:
                _train(source, model, vocab_size, val_fraction, seen["train"][1])
            encoder = Encoder(load_tokenizer(model), may_change=tokenizer is not None)
            encoded, stats = _encode(source, folder, corpus, encoder, val_fraction, shard_tokens)
            if encoded != text_sha256:
                raise DataError(
                    "the text changed while it was read: run `pgolf data prepare` again"
                )
            manifest = _manifest(
                corpus, license, note, text_sha256, val_fraction, encoder, sha256_of(model), stats
            )
            manifest["held_out"] = _write_held_out(folder, encoder, stats)
            atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            _check_written(folder, encoder, stats)
    if old:
        print(f"{out}: replaced corpus {old['corpus']}", file=sys.stderr)
    return Dataset.open(out)


def _manifest(
    corpus: str, license: str, note: str, text_sha256: str, val_fraction: float, encoder: Encoder,
    tokenizer_sha256: str, stats: dict[str, SplitStats],
) -> dict[str, Any]:  # fmt: skip
    """What manifest.json says of a prepared folder."""
    return {
        "kind": KIND,
        "version": VERSION,
        "corpus": corpus,
        "license": license,
        "note": note,
        "text_sha256": text_sha256,
        "val_fraction": val_fraction,
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": encoder.sp.get_piece_size(),
        "tokenizer_changes": changed_by(encoder.sp),
        "splits": {
            split: {**vars(s), "bytes_per_token": round(s.bytes_scored / s.tokens, 6)}
            for split, s in stats.items()
        },
    }


def _prepared_before(out: Path) -> dict[str, Any] | None:
    """The manifest of the prepared folder at `out`, None if there is nothing.

    The folder is replaced as a whole, so nothing may lie in it that is not ours.
    """
    if not out.exists():
        return None
    strange = {p.name for p in out.iterdir()} if out.is_dir() else {out.name}
    ours = read_manifest(out) if out.is_dir() else None
    if ours:
        strange -= {MANIFEST, TOKENIZER, FILE, RESULT}
        strange -= {s["file"] for split in SPLITS for s in ours["splits"][split]["shards"]}
    if strange:
        raise ConfigError(
            f"{out} is not a folder that `pgolf data prepare` wrote, or holds more than that "
            f"({min(strange)}), and would be replaced: choose another place"
        )
    return ours


def _refuse_another(out: Path, old: dict[str, Any], corpus: str, text_sha256: str) -> None:
    """Raise ConfigError unless a corpus is the one of the folder that it would replace."""
    if (old["corpus"], old["text_sha256"]) != (corpus, text_sha256):
        what = f"corpus {old['corpus']}" if old["corpus"] != corpus else "another text"
        raise ConfigError(
            f"{out} holds {what} (sha256 {old['text_sha256'][:12]}...), which {corpus} would "
            "replace: choose another --out, or replace it with --force"
        )


def _place(content: bytes, val_fraction: float) -> tuple[str, int]:
    """The split of a document and its key in the order of a shard, from the hash of its text."""
    key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
    return "val" if key < val_fraction * 2**64 else "train", key


def _count(source: Source, val_fraction: float) -> tuple[dict[str, tuple[int, int]], str]:
    """Number of documents and bytes of each split, and the sha256 of all bytes in reading order.

    Raises:
        DataError: a split would be empty.
    """
    seen = dict.fromkeys(SPLITS, (0, 0))
    digest = hashlib.sha256()
    first, all_equal = None, True
    with Progress("reading the text", source.size, "bytes") as progress:
        for document in source:
            content = document.text.encode()
            digest.update(content)
            split, key = _place(content, val_fraction)
            first = key if first is None else first
            all_equal &= key == first
            seen[split] = seen[split][0] + 1, seen[split][1] + len(content)
            progress.update(len(content))
    documents = sum(count for count, _ in seen.values())
    total = sum(size for _, size in seen.values())
    for split, (count, _) in seen.items():
        if not count:
            raise DataError(_why_empty(split, documents, total, all_equal, val_fraction))
    return seen, digest.hexdigest()


def _why_empty(split: str, documents: int, total: int, all_equal: bool, val_fraction: float) -> str:
    """Why no document fell to a split, and what helps."""
    if not documents:
        return "the text is empty: there is no document with a character in it"
    if documents == 1:
        return (
            f"there is one document, of {total:,} bytes, and a whole one is held out: give more "
            f"text (a plain text file is cut into documents only beyond {LONG:,} bytes)"
        )
    if all_equal:
        return (
            f"all {documents:,} documents are equal, and equal ones are never split between "
            "training and validation: give different documents"
        )
    return (
        f"none of {documents} documents ({total:,} bytes) fell to {split} with a validation "
        f"fraction of {val_fraction}: give more text, or another --val-fraction"
    )


def _train(
    source: Source, model: Path, vocab_size: int, val_fraction: float, train_bytes: int
) -> None:
    """Train on the training documents; if the corpus is large, on the beginning of each."""
    share = min(1.0, TRAIN_BYTES / train_bytes)

    def sample(progress: Progress) -> Iterator[str]:
        for document in source:
            content = document.text.encode()
            if _place(content, val_fraction)[0] == "train":
                yield document.text[: math.ceil(len(document.text) * share)]
            progress.update(len(content))

    size = round(train_bytes * share)
    print(f"training a tokenizer of {vocab_size} pieces on {size:,} bytes", file=sys.stderr)
    with Progress("reading for the tokenizer", source.size, "bytes") as progress:
        # the pieces are rounded up, so they may hold more than TRAIN_BYTES
        train_tokenizer(sample(progress), model, vocab_size, max_bytes=2 * TRAIN_BYTES)


def _encode(
    source: Source,
    folder: Path,
    corpus: str,
    encoder: Encoder,
    val_fraction: float,
    shard_tokens: int,
) -> tuple[str, dict[str, SplitStats]]:
    """Write all shards; the sha256 of the documents' bytes one after another, and the counts."""
    digest = hashlib.sha256()
    stats = {split: SplitStats() for split in SPLITS}
    writers = {
        split: ShardWriter(folder, f"{corpus}_{split}", shard_tokens, stats[split])
        for split in SPLITS
    }
    batches: dict[str, list[Document]] = {split: [] for split in SPLITS}
    keys: dict[str, list[int]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)

    def flush(split: str) -> None:
        writers[split].add(keys[split], encoder.encode(batches[split], stats[split]))
        progress.update(sizes[split])
        batches[split], keys[split], sizes[split] = [], [], 0

    with Progress("tokenising", source.size, "bytes") as progress:
        for document in source:
            content = document.text.encode()
            digest.update(content)
            split, key = _place(content, val_fraction)
            batches[split].append(document)
            keys[split].append(key)
            sizes[split] += len(content)
            if sizes[split] >= _BATCH_BYTES:
                flush(split)
        for split in SPLITS:
            if batches[split]:
                flush(split)
            writers[split].close()
    return digest.hexdigest(), stats


def _write_held_out(
    folder: Path, encoder: Encoder, stats: dict[str, SplitStats]
) -> dict[str, Any]:
    """The records of the held-out documents; what the manifest says of them.

    Raises:
        DataError: a training document has the tokens of one, from another text.
    """
    train, val = ([folder / shard["file"] for shard in stats[split].shards] for split in SPLITS)
    stated = write_records(folder, val)
    for place in found_in(train, (folder / FILE).read_bytes()):
        text = encoder.sp.decode(np.concatenate(place.parts)[:40].tolist())
        raise DataError(
            f"two documents that begin with {text!r} differ in nothing that the tokenizer keeps, "
            "and one of them is held out: leave one out, or use a tokenizer that changes no text"
        )
    return stated


def _check_written(folder: Path, encoder: Encoder, stats: dict[str, SplitStats]) -> None:
    """The shards as they lie on disk hold the tokens and bytes that were counted."""
    for split, s in stats.items():
        paths = [folder / shard["file"] for shard in s.shards]
        counted = count_written(paths, encoder.table, encoder.sp.get_piece_size())
        if counted != (s.tokens, s.bytes_scored):
            raise DataError(
                f"{folder}: the {split} shards hold {counted[0]} tokens for {counted[1]} bytes, "
                f"expected {s.tokens} for {s.bytes_scored}: the disk or memory is faulty"
            )
