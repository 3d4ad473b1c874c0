"""Documents to tokens on disk, with the bytes of every document accounted for exactly.

The rule of `pgolf.scoring.bpb` is applied to each document's tokens and must give the bytes of the
text that they decode to, except for one leading space, which is free after BOS. If the decoded text
is not the original one, the tokenizer normalises: that is counted, and an error unless expected.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from pgolf.data.readers import Document
from pgolf.data.shards import open_shard, write_shard
from pgolf.errors import DataError
from pgolf.files import sha256_of
from pgolf.scoring.bpb import SPACE, ByteTable


@dataclass
class SplitStats:
    """What is counted of one split: `bytes` of the original text, `bytes_scored` of its tokens.

    They differ by `leading_spaces` (1 byte each), `literal_u2581` (2 bytes each) and by what
    normalisation changes in `documents_changed` documents.
    """

    documents: int = 0
    bytes: int = 0
    bytes_scored: int = 0
    tokens: int = 0
    leading_spaces: int = 0
    literal_u2581: int = 0
    documents_changed: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)


class Encoder:
    """Turns batches of documents into tokens and counts them.

    Args:
        sp: the tokenizer.
        may_change: whether it may normalise; if not, a changed document is an error.
    """

    def __init__(self, sp: sentencepiece.SentencePieceProcessor, may_change: bool):
        self.sp, self.may_change = sp, may_change
        self.table = ByteTable(sp, sp.get_piece_size())
        # a dummy space before each document takes the place of the free one
        self.dummy_prefix = sp.encode("a", out_type=str)[0].startswith(SPACE)

    def encode(self, batch: list[Document], stats: SplitStats) -> list[np.ndarray]:
        """Each document's tokens, led by BOS, uint16 of shape (N,); adds to `stats`.

        Raises:
            DataError: a document's bytes cannot be accounted for; names it.
        """
        ids = self.sp.encode([document.text for document in batch], add_bos=True)
        tokens = np.concatenate([np.array(document_ids, np.int64) for document_ids in ids])
        starts = np.cumsum([0, *map(len, ids[:-1])])
        # BOS stands for no bytes whatever comes before it, so the roll's first pair is harmless
        counted = np.add.reduceat(self.table.count(np.roll(tokens, 1), tokens), starts)
        for document, decoded, scored in zip(
            batch, self.sp.decode(ids), counted.tolist(), strict=True
        ):
            self._account(document, decoded, scored, stats)
        stats.documents += len(batch)
        stats.tokens += tokens.size
        return np.split(tokens.astype(np.uint16), starts[1:])

    def _account(self, document: Document, decoded: str, scored: int, stats: SplitStats) -> None:
        free = decoded.startswith(" ") and not self.dummy_prefix
        if scored != len(decoded.encode()) - free:
            raise DataError(
                f"{document.where}: its tokens count for {scored} bytes, their text has "
                f"{len(decoded.encode())}: the tokenizer does not fit the byte accounting, "
                "use another one"
            )
        changed = decoded != document.text.replace(SPACE, " ")
        if changed and not self.may_change:
            raise DataError(
                f"{document.where}: decoding its tokens does not give its text back; "
                "use another tokenizer"
            )
        stats.bytes += len(document.text.encode())
        stats.bytes_scored += scored
        stats.leading_spaces += free
        stats.literal_u2581 += document.text.count(SPACE)
        stats.documents_changed += changed


class ShardWriter:
    """Collects documents and writes `NAME_%06d.bin` in `folder` whenever `shard_tokens` are there.

    The documents of a shard are written in the order of their keys. With hashes as keys that is a
    fixed shuffle: a run shorter than the corpus sees a fair sample of it, not its first topics.
    """

    def __init__(self, folder: Path, name: str, shard_tokens: int, stats: SplitStats):
        self.folder, self.name, self.shard_tokens, self.stats = folder, name, shard_tokens, stats
        self.waiting: list[tuple[int, np.ndarray]] = []
        # what did not fit into the last shard; it continues a document, so it stays in front
        self.rest = np.empty(0, np.uint16)
        self.count = 0

    def add(self, keys: list[int], documents: list[np.ndarray]) -> None:
        """Append documents, tokens (N,) each, with the keys that order them."""
        self.waiting += zip(keys, documents, strict=True)
        self.count += sum(tokens.size for tokens in documents)
        while self.count >= self.shard_tokens:
            self._write(self.shard_tokens)

    def close(self) -> None:
        """Write what is left as the last, shorter shard."""
        if self.count:
            self._write(self.count)

    def _write(self, count: int) -> None:
        self.waiting.sort(key=lambda item: item[0])
        tokens = np.concatenate([self.rest, *(tokens for _, tokens in self.waiting)])
        path = self.folder / f"{self.name}_{len(self.stats.shards):06d}.bin"
        write_shard(path, tokens[:count])
        self.waiting, self.rest, self.count = [], tokens[count:], tokens.size - count
        self.stats.shards.append({"file": path.name, "tokens": count, "sha256": sha256_of(path)})


def count_written(paths: Iterable[Path], table: ByteTable, vocab_size: int) -> tuple[int, int]:
    """Tokens and bytes of shards as they lie on disk, read in order as one stream.

    Raises:
        DataError: a shard is damaged.
    """
    tokens = total = 0
    # a stream starts with BOS, which stands for no bytes whatever comes before it
    last = np.zeros(1, np.uint16)
    step = 1 << 22
    for path in paths:
        shard = open_shard(path, vocab_size)
        tokens += shard.size
        for start in range(0, shard.size, step):
            target = shard[start : start + step]
            total += int(table.count(np.concatenate([last, target[:-1]]), target).sum())
            last = np.array(target[-1:])
    return tokens, total
