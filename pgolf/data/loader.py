"""Training batches in the contest's order: one cursor that all ranks share and that wraps around.

W = ranks, L = tokens of a rank's micro-step, T = sequence length.
A micro-step takes W (L + 1) tokens in a row; rank r's are slice r of length L + 1, x its first L
tokens and y the same shifted by one. Sequences run across documents and shards, nothing is masked.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from pgolf.data.shards import open_shard, read_header
from pgolf.errors import ConfigError, DataError


class SequentialLoader:
    """Reads the shards in the order given, forever.

    Every world size sees the same tokens in the same order if its micro-steps are of one length.

    Args:
        paths: the shards, usually `find_shards(folder, "train")`.
        rank: this process, 0 <= rank < world.
        world: number of processes that share the cursor.
        vocab_size: every token must be smaller; a shard is checked when it is first read.
        device: where batches go, in one copy of 16 bits a token that the host does not wait for.

    Raises:
        DataError: no shards, or a shard whose header is wrong.
        ConfigError: a rank outside of the world.
    """

    def __init__(
        self,
        paths: list[Path],
        rank: int,
        world: int,
        vocab_size: int,
        device: torch.device | str = "cpu",
    ):
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} is not in 0..{world - 1} (world size {world})")
        if not paths:
            raise DataError("no training shards: make some with `pgolf data prepare`")
        self.paths, self.rank, self.world, self.vocab_size = list(paths), rank, world, vocab_size
        self.device = torch.device(device)
        # ends[i] = number of tokens in shards 0..i
        self.ends = np.cumsum([read_header(path) for path in self.paths])
        self.total = int(self.ends[-1])
        self.position = 0
        self._opened: dict[int, Future[np.ndarray]] = {}
        self._opener = ThreadPoolExecutor(1, "next shard")

    def _shard(self, index: int) -> np.ndarray:
        """A shard's tokens; the next shard is checked meanwhile, off the training clock."""
        for wanted in (index, (index + 1) % len(self.paths)):
            if wanted not in self._opened:
                self._opened[wanted] = self._opener.submit(
                    open_shard, self.paths[wanted], self.vocab_size
                )
        return self._opened[index].result()

    def _take(self, start: int, count: int) -> torch.Tensor:
        """`count` tokens from `start` (modulo the total) as uint16 of shape (count,)."""
        # From page-locked memory a copy needs no wait; torch gives it out again only after that.
        tokens = torch.empty(count, dtype=torch.uint16, pin_memory=self.device.type == "cuda")
        out, filled = tokens.numpy(), 0
        while filled < count:
            at = (start + filled) % self.total
            index = int(np.searchsorted(self.ends, at, side="right"))
            shard = self._shard(index)
            offset = at - (int(self.ends[index]) - shard.size)
            piece = shard[offset : offset + count - filled]
            out[filled : filled + piece.size] = piece
            filled += piece.size
        return tokens

    def next_batch(self, local_tokens: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's next micro-step: inputs and targets, int64 of shape (L / T, T).

        Raises:
            ConfigError: `local_tokens` is not a positive multiple of `seq_len`.
            DataError: a shard's tokens do not fit the vocabulary.
        """
        if seq_len < 1 or local_tokens < seq_len or local_tokens % seq_len:
            raise ConfigError(
                f"{local_tokens} tokens of a rank's micro-step are not a positive multiple of the "
                f"sequence length {seq_len}"
            )
        span = local_tokens + 1
        tokens = self._take(self.position + self.rank * span, span)
        tokens = tokens.to(self.device, non_blocking=True)
        self.position = (self.position + self.world * span) % self.total
        # Two tensors, not one that they share: both are aligned, as compiled code wants them.
        x, y = (part.to(torch.int64) for part in (tokens[:-1], tokens[1:]))
        return x.view(-1, seq_len), y.view(-1, seq_len)

    def state_dict(self) -> dict[str, int]:
        """The shared cursor: the same on every rank, good for any world size."""
        return {"position": self.position, "total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            DataError: the shards hold another number of tokens than they did then.
        """
        if state["total"] != self.total:
            raise DataError(
                f"the checkpoint was trained on shards with {state['total']} tokens, "
                f"the shards here hold {self.total}: resume with the same ones or start a new run"
            )
        self.position = int(state["position"])
