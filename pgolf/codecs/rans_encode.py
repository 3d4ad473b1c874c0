"""Encoder of the entropy coder for quantised weights, and what a code costs in it."""

import math
from collections.abc import Sequence

import numpy as np

from pgolf.codecs.rans import HEAD_BYTES, LEAST_STATE, STATE_BYTES, lanes, least_words
from pgolf.codecs.weight_model import (
    BORDERS,
    MOST_SHRINKAGE,
    PRECISION,
    SYMBOLS,
    Coder,
    Head,
    Tables,
    WeightModel,
    pieces,
    replace_alike,
    vectors,
)

SAMPLE = 256  # rows that are compared with all
LEAST_ALIKE = 4  # rows of a cluster that is worth its side information


def compress(matrices: Sequence[np.ndarray], groups: Sequence[int]) -> bytes:
    """Encode int8 matrices (R, C); matrices of one group share statistics, in the given order.

    `rans.decompress` takes the result, the shapes and the groups.
    """
    starts, frequencies = [], []

    def record(tables: Tables, contexts: np.ndarray, codes: np.ndarray) -> None:
        at = contexts * SYMBOLS + codes.astype(np.int64) + 128
        low = tables.start[at]
        starts.append(low.astype(np.uint16))  # in its context, as PRECISION is 16
        frequencies.append((tables.start[at + 1] - low - 1).astype(np.uint16))

    model, heads = WeightModel(), bytearray()
    for matrix, group in zip(matrices, groups, strict=True):
        for piece in pieces(matrix):
            heads += bytes(_run(model, piece, group, record))
    codes = sum(m.size for m in matrices)
    states = np.full(lanes(codes), LEAST_STATE, np.int64)
    words = [np.empty(0, "<u2")]
    while starts:  # a decoder's last code is coded first
        low, frequency = starts.pop().astype(np.int64), frequencies.pop().astype(np.int64) + 1
        for first in reversed(range(0, len(low), len(states))):
            part = slice(first, first + len(states))
            f = frequency[part]
            x = states[: len(f)]
            full = (x >> 16 >= f * (LEAST_STATE >> PRECISION)).nonzero()[0]
            words.append(x[full].astype("<u2")[::-1])
            x[full] >>= 16
            x += x // f * ((1 << PRECISION) - f) + low[part]
    ends = states.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :STATE_BYTES]
    least = 2 * least_words([m.shape for m in matrices])
    stream = np.concatenate(words)[::-1].tobytes().ljust(least, b"\0")
    return bytes(heads) + ends.tobytes() + stream


def code_lengths(matrices: Sequence[np.ndarray], groups: Sequence[int]) -> list[float]:
    """Bits that each matrix takes in the stream of all, to within a few bytes a lane."""
    model, bits = WeightModel(), []

    def add(tables: Tables, contexts: np.ndarray, codes: np.ndarray) -> None:
        at = contexts * SYMBOLS + codes.astype(np.int64) + 128
        frequency = tables.start[at + 1] - tables.start[at]
        bits[-1] += float(PRECISION * len(codes) - np.log2(frequency).sum())

    for matrix, group in zip(matrices, groups, strict=True):
        bits.append(0.0)
        for piece in pieces(matrix):
            bits[-1] += 8 * HEAD_BYTES
            _run(model, piece, group, add)
    return bits


def magnitude_bits(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the codes of one matrix cost, for quantisers that weigh the rate against the error.

    Round the weights plainly first, ask with those codes, and then choose for the weight (r, c) the
    code m with the least error + lambda * bits[contexts[r, c], |m|]. The contexts are rather blunt
    (a row's and a column's mean magnitude), so one round is enough.

    Args:
        matrix: int8 (R, C).

    Returns:
        contexts: int64 (R, C), in which context each code is coded.
        bits: float64 (CONTEXTS, 128) of each magnitude, with its sign; in contexts that the matrix
            doesn't have, those of a bell.
    """
    model, contexts = WeightModel(), []
    v = vectors(matrix)
    base, shrinkage, levels = _analysis(v)
    head = Head(128, base, shrinkage, 0)
    alike = np.zeros(len(matrix), np.int8)
    model.run(0, head, alike, levels, v, lambda tables, where, codes: contexts.append(where))
    counts = model.codes[0].counts[:, :128]
    bits = np.log2(counts.sum(axis=1, keepdims=True)) - np.log2(counts) + (np.arange(128) > 0)
    of_vectors = np.array(contexts[1:]).reshape(v.shape)
    return of_vectors if v is matrix else of_vectors.T, bits


def _run(model: WeightModel, matrix: np.ndarray, group: int, code: Coder) -> Head:
    """Give the model one matrix."""
    alike = _alike(matrix)
    if alike.any():
        matrix = matrix.copy()
        replace_alike(matrix, alike, -1)
    v = vectors(matrix)
    # Lines of differences are another population; as vectors they have levels of their own.
    apart = len(matrix) > len(v) and not alike.all()
    base, shrinkage, levels = _analysis(v[:, alike == 0] if apart else v)
    largest = int(np.abs(matrix.astype(np.int16)).max(initial=0))
    head = Head(largest, base, shrinkage, int(alike.any()))
    model.run(group, head, alike, levels, v, code)
    return head


def _alike(matrix: np.ndarray) -> np.ndarray:
    """1 for rows of the largest cluster of rows that are nearly the same, int8 (R,).

    Its centre is looked for among a sample of the rows, and a row belongs to it if its distance
    from the centre is less than half of its norm: a difference is then a bit cheaper than a code.
    """
    codes = matrix.astype(np.float64)  # exact, in any order
    sample = codes[:: max(len(codes) // SAMPLE, 1)]
    norms = np.square(codes).sum(axis=1)
    distances = np.square(sample).sum(axis=1)[:, None] + norms - 2 * sample @ codes.T
    near = 4 * distances < norms
    if not len(near) or near.sum(axis=1).max() < LEAST_ALIKE:
        return np.zeros(len(codes), np.int8)
    return near[near.sum(axis=1).argmax()].astype(np.int8)


def _analysis(v: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Base, shrinkage and levels (V,) int8 of vectors (V, N).

    How far the means of the vectors and of the lines can be trusted follows from an analysis of
    variance (the estimator of James and Stein): where they differ by no more than the mean of so
    many independent codes would, the levels are all 0 and the lines' factors stay at 1.
    """
    magnitude = np.abs(v.astype(np.int16))
    if not magnitude.any():
        return 0, MOST_SHRINKAGE, np.zeros(len(v), np.int8)
    mean = int(magnitude.sum(dtype=np.int64)) / v.size
    total = int(np.square(magnitude, dtype=np.int64).sum()) / v.size - mean**2
    of_vectors = magnitude.sum(axis=1, dtype=np.int64) / v.shape[1]
    of_lines = magnitude.sum(axis=0, dtype=np.int64) / v.shape[0]
    between_vectors = float(np.square(of_vectors - mean).mean())
    between_lines = float(np.square(of_lines - mean).mean())
    within = max(total - between_vectors - between_lines, 0.0)

    noise = within / v.shape[1]
    trust = max(between_vectors - noise, 0.0) / between_vectors if between_vectors else 0.0
    levels = _level(mean + trust * (of_vectors - mean))
    base = int(_level(np.array([mean]))[0])

    real = max(between_lines - within / v.shape[0], 1e-9 * mean**2)
    shrinkage = min(max(round(math.log2(max(within / real, 1.0))), 0), MOST_SHRINKAGE)
    return base, shrinkage, (levels - base).astype(np.int8)


def _level(means: np.ndarray) -> np.ndarray:
    return np.searchsorted(BORDERS, means * 1024)
