"""What the entropy coder knows about quantised weights: shared by encoder and decoder.

The codes of a trained matrix are close to independent, symmetric and bell-shaped, with a variance
that is near to a product of a factor per row and one per column. So a matrix (R, C) is coded
vector by vector along its shorter side: V = min(R, C) vectors of N = max(R, C) codes, and

- the level of each vector, its mean magnitude in quarter octaves, is sent ahead of the codes;
- the factor of each of the N lines across the vectors is learned from the vectors before.

Their product is the predicted magnitude of a code. Rounded to quarter octaves it is the context,
and each context has an adaptive table of magnitudes, which starts from a bell of that width and
which all matrices of a group share. A code and its negative are equally likely.

All arithmetic is on integers, so encoder and decoder agree on every machine. The tables serve a
range coder or rANS (J. Duda, "Asymmetric numeral systems", arXiv 1311.2540).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

PRECISION = 16  # bits of a probability
SYMBOLS = 256  # code + 128
# 64 * 2^(i/4): mean magnitudes from 1/16 to 127 in units of 1/1024, and the borders between them.
MAGNITUDES = np.outer(1 << np.arange(6, 17), [64, 76, 91, 108]).ravel() >> 6
BORDERS = np.outer(1 << np.arange(6, 17), [70, 83, 99, 117]).ravel()[:-1] >> 6
CONTEXTS = len(MAGNITUDES)
STRENGTH = 400  # codes that a table's first shape is worth, and again at a magnitude of 4, 8, ...
MOST_SHRINKAGE = 15
STEP = 32  # weight of one code in the tables' counts
LEAST_NEWS = 1024  # codes after which tables are made anew; later, an eighth of all before

# Codes a vector: (tables, context of each code, the codes int8). A decoder fills the codes in.
Coder = Callable[["Tables", np.ndarray, np.ndarray], None]


class Head(NamedTuple):
    """What is sent ahead of a matrix.

    Attributes:
        largest: largest magnitude of its codes, 0 to 128.
        base: level of the whole matrix, 0 to CONTEXTS - 1.
        shrinkage: log2 of how many vectors a line's factor of 1 is worth beside those seen, 0 to
            MOST_SHRINKAGE. The more alike the lines, the higher.
    """

    largest: int
    base: int
    shrinkage: int


class Tables:
    """Adaptive frequencies of codes in each context.

    Attributes:
        start: cumulative frequencies in each context, int64 (contexts, SYMBOLS + 1), from 0 to
            2^PRECISION; that of a code is at code + 128. A new array whenever they change.
    """

    def __init__(self, magnitudes: np.ndarray, strength: int):
        squares = np.arange(129) ** 2 << 20
        width = 25 * magnitudes[:, None] ** 2 + (magnitudes[:, None] << 12)  # 16 variances
        bell = (width << 16) // (width + squares)  # its 8th power is close to a Gaussian
        for _ in range(3):
            bell = bell * bell >> 16
        total = STEP * (strength + (strength * magnitudes[:, None] >> 12))
        self.counts = 1 + bell * total // bell.sum(axis=1, keepdims=True)
        self.largest, self.seen, self.news = -1, 0, 0

    def ready(self, largest: int) -> None:
        """Make the frequencies anew if they're stale, or for other codes than -largest..largest."""
        if largest == self.largest and self.news < max(LEAST_NEWS, self.seen >> 3):
            return
        self.largest, self.seen, self.news = largest, self.seen + self.news, 0
        code = np.arange(SYMBOLS) - 128
        used = abs(code) <= largest
        weights = self.counts[:, abs(code)] * np.where(code == 0, 2, used)
        below = np.cumsum(weights, axis=1)
        self.start = np.zeros((len(weights), SYMBOLS + 1), np.int64)
        self.start[:, 1:] = below * ((1 << PRECISION) - used.sum()) // below[:, -1:]
        self.start[:, 1:] += np.cumsum(used)

    def learn(self, contexts: np.ndarray, codes: np.ndarray) -> None:
        """Count codes that were coded in these contexts."""
        cells = contexts * 129 + abs(codes.astype(np.int64))
        self.counts += STEP * np.bincount(cells, minlength=self.counts.size).reshape(-1, 129)
        self.news += len(codes)


class WeightModel:
    """The tables of all groups. Give it the matrices one by one, in the same order to decode."""

    def __init__(self) -> None:
        self.codes: dict[int, Tables] = {}
        self.levels: dict[int, Tables] = {}

    def run(
        self,
        group: int,
        head: Head,
        levels: np.ndarray,
        vectors: np.ndarray,
        code: Coder,
    ) -> None:
        """Code one matrix.

        Args:
            levels: int8 (V,), level of each vector less the base.
            vectors: int8 (V, N), the codes.
        """
        tables = self.levels.setdefault(group, Tables(MAGNITUDES[16:17], 8))
        tables.ready(CONTEXTS)
        contexts = np.zeros(len(levels), np.int64)
        code(tables, contexts, levels)
        tables.learn(contexts, levels)

        tables = self.codes.setdefault(group, Tables(MAGNITUDES, STRENGTH))
        # A line's factor is (seen + free) / (expected + free), its sums over the vectors so far.
        free = MAGNITUDES[head.base] << head.shrinkage
        seen = np.zeros(vectors.shape[1], np.int64)
        expected = 0
        levels = np.clip(head.base + levels.astype(np.int64), 0, CONTEXTS - 1)
        for level, vector in zip(levels, vectors, strict=True):
            tables.ready(head.largest)
            borders = BORDERS * (expected + free) // MAGNITUDES[level]
            contexts = np.searchsorted(borders, seen + free)
            code(tables, contexts, vector)
            tables.learn(contexts, vector)
            seen += abs(vector.astype(np.int64)) << 10
            expected += MAGNITUDES[level]


def vectors(matrix: np.ndarray) -> np.ndarray:
    """A view (V, N) of a matrix (R, C) whose vectors are along its longer side."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
