"""The entropy coder's model of quantised weights, shared by encoder and decoder.

The codes of a trained matrix are close to independent, symmetric and bell-shaped, with a variance
that is nearly a product of a factor per row and one per column. So a matrix (R, C) is coded
vector by vector along its shorter side: V = min(R, C) vectors of N = max(R, C) codes, and

- the level of each vector, its mean magnitude in quarter octaves, is sent before the codes;
- the factor of each of the N lines across the vectors is learned from the vectors before.

Their product is the predicted magnitude of a code. Rounded to quarter octaves it is the context,
and each context has an adaptive table of magnitudes, which starts from a bell of that width and
which all matrices of a group share. A code and its negative are equally likely.

The encoder replaces rows that are nearly the same, such as the embeddings of tokens that no text
has, by their differences from the mean of such rows above.

The state of each line takes some 100 bytes, so a matrix with a side of more than LONGEST is cut
into pieces, each coded as a matrix: this bounds the memory beside the codes.

All arithmetic is on integers, so encoder and decoder agree on every machine. The tables serve a
range coder or rANS (J. Duda, "Asymmetric numeral systems", arXiv 1311.2540).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

PRECISION = 16  # bits of a probability
SYMBOLS = 256  # code + 128
# 64 * 2^(i/4): mean magnitudes from 1/16 to 127 in units of 1/1024, and the borders between them.
MAGNITUDES = np.outer(1 << np.arange(6, 17), [64, 76, 91, 108]).ravel() >> 6
BORDERS = np.outer(1 << np.arange(6, 17), [70, 83, 99, 117]).ravel()[:-1] >> 6
CONTEXTS = len(MAGNITUDES)
STEP = 32  # weight of one code in the tables' counts
STRENGTH = 400  # codes that a table's first shape is worth, and again at a magnitude of 4, 8, ...
SIDE_MAGNITUDE, SIDE_STRENGTH = MAGNITUDES[16:17], 8  # the same of levels: 1 on average
MOST_SHRINKAGE = 15
ALIKE_SHIFT = 5  # differences of rows are taken for 2^5 times smaller than codes to begin with
LONGEST = 1 << 16  # side of a piece
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
        alike: whether some of its rows are coded as differences, 0 or 1.
    """

    largest: int
    base: int
    shrinkage: int
    alike: int


class Tables:
    """Adaptive frequencies of codes in each context.

    Attributes:
        start: cumulative frequencies of all codes in all contexts, one context after another, int64
            (contexts * SYMBOLS + 1,). That of a code is at context * SYMBOLS + code + 128; those
            of one context are from context * 2^PRECISION to the next.
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
        ends = below * ((1 << PRECISION) - used.sum()) // below[:, -1:] + np.cumsum(used)
        ends += np.arange(len(weights))[:, None] << PRECISION
        self.start = np.append(0, ends)

    def learn(self, contexts: np.ndarray, codes: np.ndarray) -> None:
        """Count codes that were coded in these contexts."""
        cells = contexts * 129 + abs(codes.astype(np.int64))
        self.counts += STEP * np.bincount(cells, minlength=self.counts.size).reshape(-1, 129)
        self.news += len(codes)


class WeightModel:
    """The tables of all groups. Give it the matrices one by one, in the same order to decode."""

    def __init__(self) -> None:
        self.codes = defaultdict(lambda: Tables(MAGNITUDES, STRENGTH))
        self.levels = defaultdict(lambda: Tables(SIDE_MAGNITUDE, SIDE_STRENGTH))
        self.alike = defaultdict(lambda: Tables(SIDE_MAGNITUDE, SIDE_STRENGTH))

    def run(
        self,
        group: int,
        head: Head,
        alike: np.ndarray,
        levels: np.ndarray,
        vectors: np.ndarray,
        code: Coder,
    ) -> None:
        """Code one matrix (R, C).

        Args:
            alike: int8 (R,), 1 for the rows that are differences. Not coded if the head has none.
            levels: int8 (V,), level of each vector less the base.
            vectors: int8 (V, N), the codes.
        """
        if head.alike:
            _run_side(self.alike[group], alike, code)
            alike &= 1
        _run_side(self.levels[group], levels, code)

        tables = self.codes[group]
        # A line's factor is seen / (expected + free), with sums over the vectors so far.
        free = MAGNITUDES[head.base] << head.shrinkage
        seen = np.full(vectors.shape[1], free)
        if len(alike) > len(levels):  # lines are rows
            seen >>= ALIKE_SHIFT * alike
        expected = 0
        levels = np.clip(head.base + levels.astype(np.int64), 0, CONTEXTS - 1)
        for level, vector in zip(levels, vectors, strict=True):
            tables.ready(head.largest)
            borders = BORDERS * (expected + free) // MAGNITUDES[level]
            contexts = np.searchsorted(borders, seen)
            code(tables, contexts, vector)
            tables.learn(contexts, vector)
            seen += abs(vector.astype(np.int64)) << 10
            expected += MAGNITUDES[level]


def _run_side(tables: Tables, values: np.ndarray, code: Coder) -> None:
    """Code side information (n,), all in one context."""
    tables.ready(CONTEXTS)
    contexts = np.zeros(len(values), np.int64)
    code(tables, contexts, values)
    tables.learn(contexts, values)


def pieces(matrix: np.ndarray) -> Iterator[np.ndarray]:
    """Views of a matrix (R, C) that cover it, none of them empty or longer than LONGEST."""
    for row in range(0, matrix.shape[0], LONGEST):
        for column in range(0, matrix.shape[1], LONGEST):
            yield matrix[row : row + LONGEST, column : column + LONGEST]


def vectors(matrix: np.ndarray) -> np.ndarray:
    """A view (V, N) of a matrix (R, C) whose vectors are along its longer side."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def replace_alike(matrix: np.ndarray, alike: np.ndarray, sign: int) -> None:
    """Replace the rows of `alike` by differences from the mean of those above, or back, in place.

    Row by row at first, and then a 32nd as many rows at once as there are above: so it takes few
    steps, however many rows there are.

    Args:
        matrix: int8 (R, C); differences wrap around.
        alike: int8 (R,), not 0 for these rows.
        sign: -1 to make differences, 1 to undo it.
    """
    rows, above = np.flatnonzero(alike), 0
    total = np.zeros(matrix.shape[1], np.int64)
    while above < len(rows):
        block = rows[above : above + max(above >> 5, 1)]
        codes = matrix[block]
        mean = (2 * total + above) // max(2 * above, 1)
        matrix[block] = changed = codes + (sign * mean).astype(np.int8)
        total += (changed if sign > 0 else codes).sum(axis=0, dtype=np.int64)
        above += len(block)
