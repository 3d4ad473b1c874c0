"""Decoder of the entropy coder for quantised weights: interleaved rANS over `weight_model`.

    stream = head of each matrix, 4 bytes; final states, 5 bytes a lane; words (u16)

Numbers are little-endian. A vector's codes go to the lanes in turn, as many at once as there are
lanes (F. Giesen, "Interleaved entropy coders", arXiv 1402.3392). There is a word for CODES_A_WORD
codes at least, with zeros behind if need be, so decoding takes time in proportion to the data's
size, whatever it declares. The encoder is `rans_encode`.
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
    replace_alike,
    vectors,
)
from pgolf.errors import ArtifactError

LEAST_STATE = 1 << 24  # states are from it to 2^16 times it, so that a code moves one word at most
STATE_BYTES = 5
HEAD_BYTES = 4
LARGEST_HEAD = Head(128, CONTEXTS - 1, MOST_SHRINKAGE, 1)
CODES_A_LANE = 1 << 15  # at most twice as many: 5 bytes for them are 0.02 %
CODES_A_WORD = 64


def lanes(codes: int) -> int:
    """How many states so many codes share: a power of two."""
    return 1 << (codes // CODES_A_LANE).bit_length() >> 1 or 1


def decompress(
    data: bytes, shapes: Sequence[tuple[int, int]], groups: Sequence[int]
) -> list[np.ndarray]:
    """The matrices, int8 (R, C), of a stream that `rans_encode.compress` made of them.

    Beside them it takes some 7 MB, whatever the data says, and a time that the shapes set.

    Args:
        shapes, groups: of each matrix, the same as when encoding.

    Raises:
        ArtifactError: damaged data, or other shapes or groups.
    """
    decoder = _Decoder(data, len(shapes), sum(map(prod, shapes)))
    model, matrices = WeightModel(), []
    for shape, group, head in zip(shapes, groups, decoder.heads, strict=True):
        matrix, alike = np.empty(shape, np.int8), np.zeros(shape[0], np.int8)
        levels = np.empty(min(shape), np.int8)
        model.run(group, head, alike, levels, vectors(matrix), decoder.fill)
        replace_alike(matrix, alike, 1)
        matrices.append(matrix)
    decoder.finish()
    return matrices


class _Decoder:
    def __init__(self, data: bytes, matrices: int, codes: int):
        front, states = HEAD_BYTES * matrices, lanes(codes)
        begin = front + STATE_BYTES * states
        self.least_words = codes // CODES_A_WORD
        if len(data) < begin + 2 * self.least_words or (len(data) - begin) % 2:
            raise ArtifactError(f"{len(data)} bytes cannot be a rans body of {codes} codes")
        self.heads = [Head(*data[at : at + HEAD_BYTES]) for at in range(0, front, HEAD_BYTES)]
        for head in self.heads:
            if any(map(gt, head, LARGEST_HEAD)):
                raise ArtifactError(f"the rans body is damaged: {head}")
        packed = np.frombuffer(data[front:begin], np.uint8).reshape(states, STATE_BYTES)
        self.states = np.pad(packed, ((0, 0), (0, 8 - STATE_BYTES))).view("<i8").ravel()
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
        symbols, lanes = codes.view(np.uint8), len(self.states)
        of_slots, of_starts = contexts << PRECISION, contexts * (SYMBOLS + 1)
        for first in range(0, len(codes), lanes):
            part = slice(first, first + lanes)
            x = self.states[: len(contexts[part])]
            slot = x & ((1 << PRECISION) - 1)
            symbol = slots[of_slots[part] + slot]
            at = of_starts[part] + symbol
            low = start[at]
            x >>= PRECISION
            x *= start[at + 1] - low
            x += slot - low
            short = (x < LEAST_STATE).nonzero()[0]
            words = self.words[self.next : self.next + len(short)]
            if len(words) < len(short):
                raise ArtifactError("the rans body ends early")
            self.next += len(short)
            x[short] = (x[short] << 16) + words
            symbols[part] = symbol ^ 128

    def finish(self) -> None:
        """Check that all is used up."""
        whole = len(self.words) == max(self.next, self.least_words)
        if not whole or self.words[self.next :].any() or (self.states != LEAST_STATE).any():
            raise ArtifactError("the rans body is damaged, or of other shapes")
