"""Decoder of the entropy coder for quantised weights: interleaved rANS over `weight_model`.

    stream = head of each matrix, 3 bytes; final states, 5 bytes a lane; words (u16)

Numbers are little-endian. A vector's codes go to the lanes in turn, as many at once as there are
lanes (F. Giesen, "Interleaved entropy coders", arXiv 1402.3392). The encoder is `rans_encode`.
"""

from collections.abc import Sequence
from math import prod
from operator import gt

import numpy as np

from pgolf.codecs.weight_model import (
    CONTEXTS,
    MOST_SHRINKAGE,
    PRECISION,
    SYMBOLS,
    Head,
    Tables,
    WeightModel,
    vectors,
)
from pgolf.errors import ArtifactError

LEAST_STATE = 1 << 24  # states are from it to 2^16 times it, so that a code moves one word at most
STATE_BYTES = 5
HEAD_BYTES = 3
LARGEST_HEAD = Head(128, CONTEXTS - 1, MOST_SHRINKAGE)
CODES_A_LANE = 1 << 15  # 5 bytes for so many codes are 0.02 %, and a few minutes are too many steps


def lanes(shapes: Sequence[tuple[int, int]]) -> int:
    """How many states the codes of these matrices share: a power of two."""
    return 1 << (sum(map(prod, shapes)) // CODES_A_LANE).bit_length() >> 1 or 1


def decompress(
    data: bytes, shapes: Sequence[tuple[int, int]], groups: Sequence[int]
) -> list[np.ndarray]:
    """The matrices, int8 (R, C), of a stream that `rans_encode.compress` made of them.

    Beside them it takes some 6 MB, whatever the data says, and a time that the shapes set.

    Args:
        shapes, groups: of each matrix, the same as when encoding.

    Raises:
        ArtifactError: damaged data, or other shapes or groups.
    """
    decoder = _Decoder(data, len(shapes), lanes(shapes))
    model, matrices = WeightModel(), []
    for shape, group, head in zip(shapes, groups, decoder.heads, strict=True):
        matrices.append(np.empty(shape, np.int8))
        levels = np.empty(min(shape), np.int8)
        model.run(group, head, levels, vectors(matrices[-1]), decoder.fill)
    decoder.finish()
    return matrices


class _Decoder:
    def __init__(self, data: bytes, matrices: int, lanes: int):
        front = HEAD_BYTES * matrices
        begin = front + STATE_BYTES * lanes
        if len(data) < begin or (len(data) - begin) % 2:
            raise ArtifactError(f"{len(data)} bytes cannot be a rans body of {matrices} matrices")
        self.heads = [Head(*data[at : at + HEAD_BYTES]) for at in range(0, front, HEAD_BYTES)]
        for head in self.heads:
            if any(map(gt, head, LARGEST_HEAD)):
                raise ArtifactError(f"the rans body is damaged: {head}")
        packed = np.frombuffer(data[front:begin], np.uint8).reshape(lanes, STATE_BYTES)
        states = np.zeros((lanes, 8), np.uint8)
        states[:, :STATE_BYTES] = packed
        self.states = states.view("<i8")[:, 0].astype(np.int64)
        self.words = np.frombuffer(data, "<u2", offset=begin)
        self.next = 0
        self.start = self.slots = np.empty(0)  # of the tables in use; slots: code + 128 of each

    def fill(self, tables: Tables, contexts: np.ndarray, codes: np.ndarray) -> None:
        """Decode one vector into `codes`, a `weight_model.Coder`."""
        if self.start is not tables.start:
            self.start = tables.start
            symbols = np.tile(np.arange(SYMBOLS, dtype=np.uint8), len(self.start))
            self.slots = np.repeat(symbols, np.diff(self.start).ravel())
        slots, start = self.slots, self.start.ravel()
        lanes = len(self.states)
        symbols = codes.view(np.uint8)
        for first in range(0, len(codes), lanes):
            context = contexts[first : first + lanes]
            x = self.states[: len(context)]
            slot = x & ((1 << PRECISION) - 1)
            symbol = slots[(context << PRECISION) + slot]
            at = context * (SYMBOLS + 1) + symbol
            low = start[at]
            x >>= PRECISION
            x *= start[at + 1] - low
            x += slot - low
            short = np.flatnonzero(x < LEAST_STATE)
            words = self.words[self.next : self.next + len(short)]
            if len(words) < len(short):
                raise ArtifactError("the rans body ends early")
            self.next += len(short)
            x[short] = (x[short] << 16) + words
            symbols[first : first + lanes] = symbol ^ 128

    def finish(self) -> None:
        if self.next != len(self.words) or (self.states != LEAST_STATE).any():
            raise ArtifactError("the rans body is damaged, or of other shapes")
