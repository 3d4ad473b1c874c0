"""The entropy coder for weights: exact, bounded, never fooled, and close to what it promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.codecs.rans import decompress
from pgolf.codecs.rans_encode import code_lengths, compress
from pgolf.errors import ArtifactError


def bell(rows: int, columns: int, std: float, seed: int = 0) -> np.ndarray:
    codes = np.random.default_rng(seed).standard_normal((rows, columns)) * std
    return codes.round().clip(-128, 127).astype(np.int8)


def round_trip(matrices: list[np.ndarray], groups: list[int]) -> int:
    """Bytes of the stream, after checking what it decodes to."""
    data = compress(matrices, groups)
    decoded = decompress(data, [m.shape for m in matrices], groups)
    for matrix, result in zip(matrices, decoded, strict=True):
        assert result.dtype == np.int8 and result.flags.c_contiguous
        np.testing.assert_array_equal(result, matrix)
    return len(data)


@st.composite
def matrix(draw) -> np.ndarray:
    shape = draw(st.tuples(st.integers(0, 40), st.integers(0, 40)))
    low = draw(st.integers(-128, 127))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(low, draw(st.integers(low, 127)), shape, np.int8, endpoint=True)


@given(st.lists(st.tuples(matrix(), st.integers(0, 5)), max_size=5))
@settings(max_examples=40, deadline=None)
def test_round_trip(parts):
    round_trip([m for m, _ in parts], [g for _, g in parts])


def test_round_trip_with_several_lanes():
    sizes = [(1, 9000), (9000, 1), (200, 333), (333, 200), (0, 5), (7, 0), (1, 1)]
    round_trip([bell(*size, std=20) for size in sizes], [0, 0, 1, 1, 2, 2, 3])


DAMAGED = [bell(12, 30, 6), bell(10, 7, 2, seed=1)]
SHAPES = [m.shape for m in DAMAGED]


def test_every_truncation_and_tail_is_refused():
    data = compress(DAMAGED, [0, 0])
    for end in range(0, len(data), 5):
        with pytest.raises(ArtifactError):
            decompress(data[:end], SHAPES, [0, 0])
    for tail in (b"\0", b"\0\0", data):
        with pytest.raises(ArtifactError):
            decompress(data + tail, SHAPES, [0, 0])


def test_every_flipped_bit_of_the_front_and_some_behind_are_refused():
    data = compress(DAMAGED, [0, 0])
    for at in [*range(20), *range(20, len(data), 9)]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(ArtifactError):
            decompress(bytes(damaged), SHAPES, [0, 0])


def test_other_shapes_are_refused():
    data = compress(DAMAGED, [0, 0])
    for shapes in ([(12, 29), (10, 7)], [(12, 30), (11, 7)], [(12, 30)], [*SHAPES, (1, 1)]):
        with pytest.raises(ArtifactError):
            decompress(data, shapes, [0] * len(shapes))


def test_code_lengths_are_those_of_the_stream():
    matrices = [bell(300, 200, 3), bell(128, 256, 9, seed=1), bell(64, 64, 0.3, seed=2)]
    ideal = sum(code_lengths(matrices, [0, 0, 1])) / 8
    assert ideal < round_trip(matrices, [0, 0, 1]) < 1.001 * ideal + 24
