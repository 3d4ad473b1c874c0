"""Decoder of the entropy coder for quantised weights: interleaved rANS over `weight_model`.

    stream = head of each piece, 4 bytes; final states, 5 bytes a lane; words (u16)

Numbers are little-endian. A vector's codes go to the lanes in turn, as many at once as there are
lanes (F. Giesen, "Interleaved entropy coders", arXiv 1402.3392). A stream has at least one word per
CODES_A_WORD codes, where a vector counts as VECTOR_CODES more; zeros pad it if need be. So decoding
takes a second or two plus time in proportion to the data's size, whatever it declares.
The encoder is `rans_encode`.
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
    pieces,
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
VECTOR_CODES = 256  # the time that a vector takes besides that for its codes, or a matrix


def lanes(codes: int) -> int:
    """How many states so many codes share: a power of two."""
    return 1 << (codes // CODES_A_LANE).bit_length() >> 1 or 1


def least_words(shapes: Sequence[tuple[int, int]]) -> int:
    """Words that a stream of matrices (R, C) has at least."""
    return sum(prod(s) + VECTOR_CODES * (1 + min(s)) for s in shapes) // CODES_A_WORD


def decompress(
    data: bytes, shapes: Sequence[tuple[int, int]], groups: Sequence[int]
) -> list[np.ndarray]:
    """The matrices, int8 (R, C), of a stream that `rans_encode.compress` made of them.

    Beside them it takes some 6 MB and 150 kB a group, whatever the data says; the time has a bound
    that the data's size sets, see above.

    Args:
        shapes, groups: of each matrix, the same as when encoding.

    Raises:
        ArtifactError: damaged data, or other shapes or groups.
    """
    codes, words = sum(map(prod, shapes)), least_words(shapes)
    if len(data) < 2 * words:
        raise ArtifactError(f"declares {codes} codes, too many for a rans body of {len(data)}")
    matrices = [np.empty(shape, np.int8) for shape in shapes]
    parts = [(p, g) for m, g in zip(matrices, groups, strict=True) for p in pieces(m)]
    decoder, model = _Decoder(data, len(parts), codes, words), WeightModel()
    for (piece, group), head in zip(parts, decoder.heads, strict=True):
        alike, levels = np.zeros(len(piece), np.int8), np.empty(min(piece.shape), np.int8)
        model.run(group, head, alike, levels, vectors(piece), decoder.fill)
        replace_alike(piece, alike, 1)
    decoder.finish()
    return matrices


class _Decoder:
    def __init__(self, data: bytes, heads: int, codes: int, least_words: int):
        front, states = HEAD_BYTES * heads, lanes(codes)
        begin = front + STATE_BYTES * states
        self.least_words = least_words
        if len(data) < begin + 2 * least_words or (len(data) - begin) % 2:
            raise ArtifactError(f"{len(data)} bytes cannot be a rans body of {codes} codes")
        self.heads = [Head(*data[at : at + HEAD_BYTES]) for at in range(0, front, HEAD_BYTES)]
        for head in self.heads:
            if any(map(gt, head, LARGEST_HEAD)):
                raise ArtifactError(f"the rans body is damaged: {head}")
        packed = np.frombuffer(data[front:begin], np.uint8).reshape(states, STATE_BYTES)
        self.states = np.pad(packed, ((0, 0), (0, 8 - STATE_BYTES))).view("<i8").ravel()
        self.words = np.frombuffer(data, "<u2", offset=begin)
        self.next = 0

    def fill(self, tables: Tables, contexts: np.ndarray, codes: np.ndarray) -> None:
        """Decode one vector into `codes`, a `weight_model.Coder`."""
        start, symbols, lanes = tables.start, codes.view(np.uint8), len(self.states)
        slots = contexts << PRECISION
        for first in range(0, len(codes), lanes):
            part = slice(first, first + lanes)
            x = self.states[: len(contexts[part])]
            slot = slots[part] + (x & ((1 << PRECISION) - 1))
            at = start.searchsorted(slot, "right") - 1  # the last to begin there; others are empty
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
            symbols[part] = (at % SYMBOLS) ^ 128

    def finish(self) -> None:
        """Check that all is used up."""
        whole = len(self.words) == max(self.next, self.least_words)
        if not whole or self.words[self.next :].any() or (self.states != LEAST_STATE).any():
            raise ArtifactError("the rans body is damaged, or of other shapes")
