"""Encoder of the entropy coder for quantised weights, and what a code costs in it."""

import math
from collections.abc import Sequence

import numpy as np

from pgolf.codecs.rans import HEAD_BYTES, LEAST_STATE, STATE_BYTES, lanes
from pgolf.codecs.weight_model import (
    BORDERS,
    MOST_SHRINKAGE,
    PRECISION,
    Coder,
    Head,
    Tables,
    WeightModel,
    vectors,
)


def compress(matrices: Sequence[np.ndarray], groups: Sequence[int]) -> bytes:
    """Encode int8 matrices (R, C); matrices of one group share statistics, in the given order.

    `rans.decompress` takes the result, the shapes and the groups.
    """
    starts, frequencies = [], []

    def record(tables: Tables, contexts: np.ndarray, codes: np.ndarray) -> None:
        symbols = codes.astype(np.int64) + 128
        low = tables.start[contexts, symbols]
        starts.append(low.astype(np.uint16))
        frequencies.append((tables.start[contexts, symbols + 1] - low - 1).astype(np.uint16))

    model, heads = WeightModel(), bytearray()
    for matrix, group in zip(matrices, groups, strict=True):
        heads += bytes(_run(model, matrix, group, record))
    states = np.full(lanes([m.shape for m in matrices]), LEAST_STATE, np.int64)
    words = []
    while starts:
        low, frequency = starts.pop().astype(np.int64), frequencies.pop().astype(np.int64) + 1
        for first in reversed(range(0, len(low), len(states))):
            f = frequency[first : first + len(states)]
            x = states[: len(f)]
            full = np.flatnonzero(x >= f << (24 - PRECISION + 16))
            words.append(x[full].astype("<u2")[::-1])
            x[full] >>= 16
            whole = x // f
            x += whole * ((1 << PRECISION) - f) + low[first : first + len(states)]
    ends = states.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :STATE_BYTES].tobytes()
    return bytes(heads) + ends + np.concatenate([*words, np.empty(0, "<u2")])[::-1].tobytes()


def code_lengths(matrices: Sequence[np.ndarray], groups: Sequence[int]) -> list[float]:
    """Bits that each matrix takes in the stream of all, to within a few bytes a lane."""
    model, bits = WeightModel(), []

    def add(tables: Tables, contexts: np.ndarray, codes: np.ndarray) -> None:
        symbols = codes.astype(np.int64) + 128
        frequency = tables.start[contexts, symbols + 1] - tables.start[contexts, symbols]
        bits[-1] += float(PRECISION * len(codes) - np.log2(frequency).sum())

    for matrix, group in zip(matrices, groups, strict=True):
        bits.append(8.0 * HEAD_BYTES)
        _run(model, matrix, group, add)
    return bits


def _run(model: WeightModel, matrix: np.ndarray, group: int, code: Coder) -> Head:
    """Give the model one matrix."""
    v = vectors(matrix)
    head, levels = _side_information(v)
    model.run(group, head, levels, v, code)
    return head


def _side_information(v: np.ndarray) -> tuple[Head, np.ndarray]:
    """Head of a matrix of vectors (V, N), and levels (V,) int8.

    How far the means of the vectors and of the lines can be trusted follows from an analysis of
    variance (the estimator of James and Stein): where they differ by no more than the mean of so
    many independent codes would, the levels are all 0 and the lines' factors stay at 1.
    """
    magnitude = np.abs(v.astype(np.int16))
    largest = int(magnitude.max(initial=0))
    if not largest:
        return Head(0, 0, MOST_SHRINKAGE), np.zeros(len(v), np.int8)
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
    return Head(largest, base, shrinkage), (levels - base).astype(np.int8)


def _level(means: np.ndarray) -> np.ndarray:
    return np.searchsorted(BORDERS, means * 1024)
