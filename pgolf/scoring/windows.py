"""Exact sliding-window evaluation in bits per byte.

A window of L tokens starts every `stride` targets. The first scores all its targets, every later
one its last `stride`, and the last is anchored at the end and scores only what is left: each
target is scored once, with at least L - stride tokens of context after the first window.
stride = L is the non-overlapping form. Sums are in float64.
N = number of targets; tokens has N + 1 entries, target i is tokens[i + 1].
"""

from dataclasses import dataclass

import numpy as np
import torch

from pgolf.data.shards import check_documents
from pgolf.errors import DataError
from pgolf.model import GPT
from pgolf.progress import Progress
from pgolf.ranks import ALONE, Ranks
from pgolf.scoring.bpb import ByteTable, bits_per_byte


@dataclass
class Sums:
    """Totals over scored targets; those of several ranks are added, then divided."""

    nll: float = 0.0  # nats
    targets: int = 0
    bytes: int = 0

    def over(self, ranks: Ranks) -> "Sums":
        """The totals of all ranks together, on each of them."""
        nll, targets, size = ranks.sum([self.nll, self.targets, self.bytes])
        return Sums(nll, int(targets), int(size))

    @property
    def loss(self) -> float:
        """Mean loss in nats a token."""
        return self.nll / self.targets

    @property
    def bpb(self) -> float:
        """Bits per byte."""
        return bits_per_byte(self.nll, self.bytes)


def windows(targets: int, length: int, stride: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Windows that score each of `targets` targets once.

    Returns:
        (length of every window, start of each, how many of its last targets each scores).
    """
    if targets < 1 or not 1 <= stride <= length:
        raise DataError(
            f"cannot score {targets} targets in windows of {length} with stride {stride}: "
            "there must be a target, and 1 <= stride <= length"
        )
    length = min(length, targets)
    starts = np.arange(0, targets - length + 1, min(stride, length))
    scored = np.full(len(starts), min(stride, length))
    scored[0] = length
    left = targets - (starts[-1] + length)
    if left:
        starts, scored = np.append(starts, targets - length), np.append(scored, left)
    return length, starts, scored


@torch.no_grad()
def evaluate(
    model: GPT,
    tokens: np.ndarray,
    table: ByteTable,
    length: int,
    stride: int,
    batch_tokens: int,
    ranks: Ranks = ALONE,
    progress: str = "",
) -> Sums:
    """Score a token stream, or a rank's part of its windows.

    Args:
        model: called as model(ids, targets, last=n) for losses (N, n); may be compiled.
        tokens: (N + 1,) ids, memory-mapped or not.
        batch_tokens: tokens a forward pass, at most.
        ranks: each scores a contiguous run of the windows.
        progress: label of the first rank's progress line; '' shows none.
    """
    length, starts, scored = windows(len(tokens) - 1, length, stride)
    own = ranks.part(len(starts))
    starts, scored = starts[own], scored[own]
    device = next(model.parameters()).device
    offsets = np.arange(length + 1)
    per_batch, most = max(batch_tokens // length, 1), model.most_documents(length)
    total = torch.zeros((), dtype=torch.float64, device=device)
    sums = Sums()
    with Progress(progress, len(starts), "windows", enabled=bool(progress) and ranks.first) as bar:
        i = 0
        while i < len(starts):
            last = int(scored[i])
            n = 1  # a batch holds windows that score the same number of targets
            while n < per_batch and i + n < len(starts) and scored[i + n] == last:
                n += 1
            rows = tokens[starts[i : i + n, None] + offsets].astype(np.int64)
            if most:
                check_documents(rows[:, :-1], most, model.config.bos_id)
            batch = torch.from_numpy(rows).to(device)
            total += model(batch[:, :-1], batch[:, 1:], last=last).double().sum()
            sums.targets += n * last
            sums.bytes += int(table.count(rows[:, -last - 1 : -1], rows[:, -last:]).sum())
            i += n
            bar.update(n)
    sums.nll = total.item()
    return sums
