"""Training batches: sequences of an order that all ranks share, read ahead by a thread."""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pgolf.data.order import order_of
from pgolf.data.shards import check_documents, check_tokens, open_shard, read_header
from pgolf.errors import ConfigError, DataError
from pgolf.ranks import Ranks

AHEAD = 2  # micro-steps
CARRIED = 64  # floats that fit before the tokens


class _Reading(NamedTuple):
    """A batch that is being read: its first sequence, and (n, T + 1) tokens once that is done.

    The tokens are at the end of the buffer that goes to the device.
    """

    first: int
    tokens: torch.Tensor
    sent: torch.Tensor
    done: Future[None]


class Loader:
    """Reads shards in an order, forever; sequences run across documents, nothing is masked.

    A micro-step takes the next sequences of the order, W L / T of them for W ranks, L tokens of a
    rank and sequences of T; rank r's are part r of W. So a step's tokens are the same for any
    number of ranks and passes.

    Args:
        paths: the shards, usually `find_shards(folder, "train")`.
        ranks: this process and those that share the order. Batches go to its device, in one copy of
            16 bits a token that the host does not wait for.
        vocab_size: every token that is read must be smaller.
        seq_len: tokens of a sequence, T.
        slice_tokens: of the sequential order.
        order: the name of one in `pgolf.data.order`.
        seed: of that order.
        most_documents: that a sequence may hold; 0: any number.

    Raises:
        DataError: no shards, or a shard whose header is wrong.
        ConfigError: the shards are too short for the order.
    """

    def __init__(
        self,
        paths: list[Path],
        ranks: Ranks,
        vocab_size: int,
        seq_len: int,
        slice_tokens: int,
        order: str = "sequential",
        seed: int = 0,
        most_documents: int = 0,
    ):
        if not paths:
            raise DataError("no training shards: make some with `pgolf data prepare`")
        self.paths, self.ranks, self.vocab_size = list(paths), ranks, vocab_size
        self.seq_len, self.device = seq_len, ranks.device
        self.most_documents = most_documents
        # ends[i] = number of tokens in shards 0..i
        self.ends = list(accumulate(read_header(path) for path in self.paths))
        self.total = self.ends[-1]
        self.position = 0  # sequences that all ranks have had
        self.order = order_of(order, self.total, seq_len, slice_tokens, seed)
        self._opened: dict[int, np.ndarray] = {}  # the reader's own
        self._reader = ThreadPoolExecutor(1, "batches")
        self._ahead: deque[_Reading] = deque()

    def next_batch(
        self, local_tokens: int, numbers: Sequence[float] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's next micro-step: inputs and targets, int64 of shape (L / T, T).

        Args:
            numbers: that go to the device in the same copy, to `carried` (fp32); CARRIED at most.

        Raises:
            ConfigError: `local_tokens` is not a positive multiple of the sequence length.
            DataError: a shard's tokens do not fit the vocabulary, or a sequence holds too many
                documents.
        """
        rows, ragged = divmod(local_tokens, self.seq_len)
        if rows < 1 or ragged:
            raise ConfigError(
                f"{local_tokens} tokens of a rank's micro-step are not a positive multiple of the "
                f"sequence length {self.seq_len}"
            )
        of_all, first = self.ranks.world * rows, self.position + self.ranks.rank * rows
        reading = self._ahead
        if reading and (reading[0].first, len(reading[0].tokens)) != (first, rows):
            reading.clear()
        for n in range(len(reading), AHEAD + 1):
            reading.append(self._read(first + n * of_all, rows))
        batch = reading.popleft()
        batch.done.result()
        self.position += of_all
        head = 2 * len(numbers)
        batch.sent[:head].view(torch.float32)[:] = torch.tensor(numbers)
        sent = batch.sent.to(self.device, non_blocking=True)
        self.carried = sent[:head].view(torch.float32)
        tokens = sent[2 * CARRIED :].view(batch.tokens.shape)
        # Two tensors, not one that they share: both are aligned, as compiled code wants them.
        x, y = (part.to(torch.int64) for part in (tokens[:, :-1], tokens[:, 1:]))
        return x, y

    # --- the reader ---------------------------------------------------------------------------

    def _read(self, first: int, count: int) -> _Reading:
        """Let the reader fill in a batch."""
        # From page-locked memory a copy needs no wait; torch gives it out again only after that.
        # And it is taken here: the reader's thread has no device.
        size, pinned = count * (self.seq_len + 1), self.device.type == "cuda"
        sent = torch.empty(2 * CARRIED + size, dtype=torch.uint16, pin_memory=pinned)
        sent[: 2 * CARRIED].zero_()
        tokens = sent[2 * CARRIED :].view(count, -1)
        done = self._reader.submit(self._fill, first, tokens.numpy())
        return _Reading(first, tokens, sent, done)

    def _fill(self, first: int, rows: np.ndarray) -> None:
        starts = self.order(first, len(rows)).tolist()
        for row, start in zip(rows, starts, strict=True):
            filled = 0
            for _, _, piece in self._pieces(start, row.size):
                row[filled : filled + piece.size] = piece
                filled += piece.size
        if int(rows.max()) >= self.vocab_size:
            for start in starts:
                for path, offset, piece in self._pieces(start, rows.shape[1]):
                    check_tokens(path, piece, offset, self.vocab_size)
        if self.most_documents:
            check_documents(rows[:, :-1], self.most_documents)

    def _pieces(self, start: int, count: int) -> Iterator[tuple[Path, int, np.ndarray]]:
        """`count` tokens from `start` (modulo the total): shard, place there, tokens."""
        while count:
            at = start % self.total
            index = bisect_right(self.ends, at)
            if index not in self._opened:
                self._opened[index] = open_shard(self.paths[index], None)
            shard = self._opened[index]
            offset = at - (self.ends[index] - shard.size)
            piece = shard[offset : offset + count]
            yield self.paths[index], offset, piece
            start, count = start + piece.size, count - piece.size

    # --- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """The number of sequences that all ranks have read; it fits any number of ranks."""
        return {"sequences": self.position, "total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            DataError: the shards hold another number of tokens than they did then, or the state is
                of an older version.
        """
        if "sequences" not in state:
            raise DataError(
                "the checkpoint counts tokens, as an older version did: train anew, or go on with "
                "that version"
            )
        if state["total"] != self.total:
            raise DataError(
                f"the checkpoint was trained on shards with {state['total']} tokens, "
                f"the shards here hold {self.total}: resume with the same ones or start a new run"
            )
        self.position = int(state["sequences"])
