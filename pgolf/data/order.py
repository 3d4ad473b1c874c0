"""Where each sequence of a run begins: a function of its number alone.

Sequences are numbered across steps, micro-steps and ranks. So any number of ranks trains a step on
the same tokens, and a run resumes from the number of sequences that it has read. Positions count
the tokens of all shards, end to end.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from pgolf.errors import ConfigError

Order = Callable[[int, int], np.ndarray]  # first number, count -> (count,) int64 positions
GOLDEN = (math.sqrt(5) - 1) / 2
NEAR = 64  # blocks within which a stride is looked for


def order_of(name: str, total: int, seq_len: int, slice_tokens: int, seed: int) -> Order:
    """A run's order.

    sequential: as in the published scripts: slices of slice_tokens + 1 tokens in a row, forever.
        Sequences of a slice share the token at which they meet.
    coprime: each of the blocks of seq_len tokens once, then anew, with the blocks cut elsewhere. A
        stride that is coprime to their number and near its golden section leads from one to the
        next, so that the sequences of any batch lie evenly over all shards (after PR 1060, which
        draws strides and picks shards by chance).
    shuffled: the same blocks in an order drawn by chance for each pass, which takes 4 bytes a block
        (after PR 1394, which deals whole shards to ranks).

    Args:
        total: tokens of all shards.
        slice_tokens: a multiple of seq_len.
        seed: decides cuts, beginnings and permutations.

    Raises:
        ConfigError: the shards hold less than a sequence and its last target, or than two blocks;
            or slices are not of whole sequences.
    """
    needed = seq_len + 1 if name == "sequential" else 2 * seq_len
    if total < needed:
        raise ConfigError(
            f"order={name} needs {needed} tokens or more for seq_len={seq_len}, the shards hold "
            f"{total}: use more text or a smaller seq_len"
        )
    if name == "sequential":
        rows, ragged = divmod(slice_tokens, seq_len)
        if rows < 1 or ragged:
            raise ConfigError(
                f"slices of {slice_tokens} tokens are not of whole sequences of {seq_len}"
            )

        def sequential(first: int, count: int) -> np.ndarray:
            numbers = np.arange(first, first + count)
            return (numbers * seq_len + numbers // rows) % total

        return sequential
    blocks = total // seq_len - 1  # wherever they are cut, with a target behind the last token
    stride = _stride(blocks)

    @lru_cache(maxsize=1)  # a permutation of all blocks is large
    def drawn(number: int) -> tuple[int, int | np.ndarray]:
        """Of one pass over all blocks: where they are cut, and the first one or all in order."""
        # What it draws is promised to be the same in every version of numpy, unlike a Generator's.
        random = np.random.RandomState([seed, number])
        cut = random.randint(seq_len)
        if name == "coprime":
            return cut, random.randint(blocks)
        return cut, random.permutation(np.arange(blocks, dtype=np.int32))

    def in_blocks(first: int, count: int) -> np.ndarray:
        passes, places = np.divmod(np.arange(first, first + count), blocks)
        for number in range(int(passes[0]), int(passes[-1]) + 1):
            now = passes == number
            cut, order = drawn(number)
            if name == "shuffled":
                block = order[places[now]].astype(np.int64)
            else:
                block = (order + places[now] * stride) % blocks
            places[now] = cut + block * seq_len
        return places

    return in_blocks


def _stride(blocks: int) -> int:
    """Coprime to `blocks`, near their golden section, and as hard to approximate as that is.

    How unevenly multiples of a fraction lie follows from the quotients of its continued fraction
    (the three-gap theorem): those of the golden section are all 1, and a neighbour's may be large.
    """
    middle = round(blocks * GOLDEN)

    def unevenness(stride: int) -> tuple[int, int]:
        largest, a, b = 0, blocks, stride
        while b:
            quotient, (a, b) = a // b, (b, a % b)
            largest = max(largest, quotient)
        return largest, abs(stride - middle)

    near = range(max(1, middle - NEAR), max(2, min(blocks, middle + NEAR)))
    return min((s for s in near if math.gcd(s, blocks) == 1), key=unevenness)
