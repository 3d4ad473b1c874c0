"""The entropy coder for weights: exact, bounded, never fooled, and as small as it promises."""

import hashlib
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.codecs import rans, weight_model
from pgolf.codecs.rans import (
    CODES_A_WORD,
    HEAD_BYTES,
    STATE_BYTES,
    VECTOR_CODES,
    decompress,
    lanes,
    least_words,
)
from pgolf.codecs.rans_encode import _analysis, code_lengths, compress, magnitude_bits
from pgolf.codecs.weight_model import CONTEXTS, SYMBOLS, WeightModel, pieces
from pgolf.errors import ArtifactError


def codes_of(weights: np.ndarray, largest: int = 127) -> np.ndarray:
    return weights.round().clip(-largest, largest).astype(np.int8)


def bell(rows: int, columns: int, std: float | np.ndarray, seed: int = 0) -> np.ndarray:
    return codes_of(np.random.default_rng(seed).standard_normal((rows, columns)) * std)


def entropy(codes: np.ndarray) -> float:
    """Order-0 entropy of all codes of a matrix, in bits."""
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    return -float(codes.size * (shares * np.log2(shares)).sum())


def round_trip(matrices: list[np.ndarray], groups: list[int]) -> int:
    """Bytes of the stream, after checking what it decodes to."""
    before = [m.copy() for m in matrices]
    data = compress(matrices, groups)
    decoded = decompress(data, [m.shape for m in matrices], groups)
    for matrix, result in zip(before, decoded, strict=True):
        assert result.dtype == np.int8 and result.flags.c_contiguous
        np.testing.assert_array_equal(result, matrix)
    for matrix, given_ in zip(before, matrices, strict=True):
        np.testing.assert_array_equal(given_, matrix)  # encoding leaves its input as it was
    return len(data)


@st.composite
def matrix(draw) -> np.ndarray:
    shape = draw(st.tuples(st.integers(0, 40), st.integers(0, 40)))
    low = draw(st.integers(-128, 127))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(low, draw(st.integers(low, 127)), shape, np.int8, endpoint=True)


@given(st.lists(st.tuples(matrix(), st.integers(0, 5)), max_size=5))
@settings(max_examples=25, deadline=None)
def test_round_trip(parts):
    round_trip([m for m, _ in parts], [g for _, g in parts])


@pytest.fixture
def several_lanes(monkeypatch):
    """Lanes for few codes already, as otherwise for many."""
    monkeypatch.setattr(rans, "CODES_A_LANE", 64)


def test_round_trip_with_several_lanes(several_lanes):
    sizes = [(1, 3000), (3000, 1), (20, 333), (333, 20), (0, 5), (7, 0), (1, 1)]
    matrices = [bell(*size, std=20) for size in sizes]
    assert lanes(sum(m.size for m in matrices)) == 256
    round_trip(matrices, [0, 0, 1, 1, 2, 2, 3])


@pytest.mark.parametrize("shape", [(30, 90), (90, 30)])
def test_constant_matrices(shape: tuple[int, int]):
    round_trip([np.full(shape, value, np.int8) for value in (-128, -1, 0, 1, 127)], [0] * 5)


@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (3, 17), (16, 32), (0, 99), (99, 0)])
def test_pieces_cover_a_matrix_once(monkeypatch, shape: tuple[int, int]):
    monkeypatch.setattr(weight_model, "LONGEST", 16)
    matrix = np.zeros(shape, np.int8)
    for piece in pieces(matrix):
        assert 0 < min(piece.shape) and max(piece.shape) <= 16
        piece += 1
    assert (matrix == 1).all()
    codes = bell(*shape, std=9)
    assert round_trip([codes, codes // 2], [0, 0]) >= sum(code_lengths([codes, codes], [0, 0])) / 9


def test_all_zeros_take_a_word_for_64_codes_and_4_for_a_vector():
    """So that a few bytes cannot declare hours of work."""
    zeros = np.zeros((128, 256), np.int8)
    work = zeros.size + VECTOR_CODES * 129
    assert round_trip([zeros], [0]) >= 2 * work // CODES_A_WORD
    assert least_words([zeros.shape] * 3) == 3 * work // CODES_A_WORD
    data = compress([zeros], [0])
    with pytest.raises(ArtifactError, match="cannot be"):
        decompress(data[:-2], [zeros.shape], [0])
    with pytest.raises(ArtifactError, match="declares 32768 codes, too many"):
        decompress(data[:2000], [zeros.shape], [0])
    with pytest.raises(ArtifactError, match="damaged"):
        decompress(data[:-1] + b"\1", [zeros.shape], [0])


def test_the_same_bytes_on_every_machine():
    """The format: if this digest changes, older artifacts are lost."""
    weights = (np.arange(96 * 160).reshape(96, 160) * 7919 % 10_007 % 61 - 30) * 2
    weights[10:90] = weights[40] + (np.arange(80 * 160).reshape(80, 160) * 31 % 7 == 0)
    matrices = [weights.astype(np.int8), weights.T[:50].astype(np.int8) // 4]
    digest = hashlib.sha256(compress(matrices, [0, 1])).hexdigest()
    assert digest[:16] == "209b80b4e6014ccc"


SMALL = [bell(12, 30, 6), bell(10, 7, 2, seed=1)]
SHAPES = [m.shape for m in SMALL]


def test_truncations_and_tails_are_refused():
    data = compress(SMALL, [0, 0])
    for end in range(0, len(data), 3):
        with pytest.raises(ArtifactError):
            decompress(data[:end], SHAPES, [0, 0])
    for tail in (b"\0", b"\0\0", data):
        with pytest.raises(ArtifactError):
            decompress(data + tail, SHAPES, [0, 0])


def test_damage_is_refused(several_lanes):
    """Every byte changed. (A change that decodes to another matrix is for the file's checksum.)"""
    data = compress(SMALL, [0, 0])
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(ArtifactError):
            decompress(bytes(damaged), SHAPES, [0, 0])


@given(st.binary(min_size=600, max_size=640), st.integers(0, 10))
@settings(max_examples=25, deadline=None)
def test_noise_is_refused(noise: bytes, kept: int):
    """Behind some of the true front, so that it isn't only the heads that are refused."""
    data = compress(SMALL, [0, 0])
    front = data[: HEAD_BYTES * 2 + STATE_BYTES + 2 * kept]
    with pytest.raises(ArtifactError):
        decompress(front + noise, SHAPES, [0, 0])


def test_other_shapes_are_refused():
    data = compress(SMALL, [0, 0])
    for shapes in ([(12, 29), (10, 7)], [(12, 30), (11, 7)], [(12, 30)], [*SHAPES, (1, 1)]):
        with pytest.raises(ArtifactError):
            decompress(data, shapes, [0] * len(shapes))


# The most that a small stream can ask for in one respect: matrices, of how many groups.
DEAREST = {
    "wide": ([(1, 2 << 20)], 1),
    "tall": ([(2 << 20, 1)], 1),
    "empty": ([(0, 1 << 29), (1 << 29, 0)], 1),
    "many": ([(1, 1)] * 2000, 62),
    "groups": ([(91, 181)] * 62, 62),
    "one lane": ([(255, 256)], 1),
    "alike": ([(1 << 19, 1)], 1),
}


def decoded_within(seconds: float, data: bytes, *args) -> list[np.ndarray]:
    """The matrices, after checking the time of this process. The machine may be busy."""
    began = time.process_time()
    result = decompress(data, *args)
    assert time.process_time() - began < seconds
    return result


def decoding_memory(data: bytes, *args) -> int:
    """Bytes that decoding takes at most, with its result."""
    tracemalloc.start()
    decompress(data, *args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_decoder_takes_little_more_memory_than_its_result():
    matrices = [bell(512, 1024, 8), bell(1024, 512, 8)]
    data, shapes = compress(matrices, [0, 1]), [m.shape for m in matrices]
    assert decoding_memory(data, shapes, [0, 1]) < sum(m.size for m in matrices) + 3e6


@pytest.mark.slow
@pytest.mark.parametrize("name", DEAREST)
def test_the_dearest_small_streams_take_little_time_and_memory(name: str):
    shapes, groups = DEAREST[name]
    # Every other matrix has another largest code, for which the tables change.
    matrices = [np.full(s, (name == "alike") * 3 + i // groups % 2, np.int8)
                for i, s in enumerate(shapes)]
    groups = [i % groups for i in range(len(shapes))]
    data = compress(matrices, groups)
    decoded = decoded_within(6, data, shapes, groups)
    assert all(map(np.array_equal, decoded, matrices))
    if name in ("wide", "empty", "many"):
        peak = decoding_memory(data, shapes, groups)
        assert peak < (12 << 20) + sum(m.size for m in matrices)


def test_code_lengths_are_those_of_the_stream():
    matrices = [bell(300, 200, 3), bell(128, 256, 9, seed=1), bell(64, 64, 0.3, seed=2)]
    ideal = sum(code_lengths(matrices, [0, 0, 1])) / 8
    lost = STATE_BYTES * lanes(sum(m.size for m in matrices))
    assert ideal - 1 < round_trip(matrices, [0, 0, 1]) < 1.0003 * ideal + lost


SHAPE = (512, 512)
SCALES = np.exp(0.3 * np.random.default_rng(5).standard_normal(512))


@pytest.mark.parametrize(
    "draw, limit",
    [
        (lambda rng: codes_of(rng.normal(0, 8, SHAPE), 31), 1.001),
        (lambda rng: codes_of(rng.laplace(0, 5, SHAPE), 31), 1.001),
        (lambda rng: codes_of(rng.normal(0, 2, SHAPE), 31), 1.0013),
        (lambda rng: codes_of(rng.normal(0, 8, (128, 128)), 31), 1.0055),
        (lambda rng: codes_of(rng.normal(0, 8, SHAPE) * SCALES), 0.986),
        (lambda rng: codes_of(rng.normal(0, 8, SHAPE) * SCALES[:, None]), 0.986),
        (lambda rng: codes_of(rng.normal(0, 8, SHAPE) * SCALES[:, None] * SCALES), 0.974),
    ],
    ids=["gauss", "laplace", "narrow", "small", "columns", "rows", "both"],
)
def test_size_beside_the_order_0_entropy(draw: Callable[..., np.ndarray], limit: float):
    """Nearly nothing lost on independent codes, and scales of rows and columns are made use of."""
    codes = draw(np.random.default_rng(7))
    assert code_lengths([codes], [0])[0] < limit * entropy(codes)


def test_means_are_trusted_as_far_as_they_differ():
    """Sampling noise alone moves no level and no line's factor; true differences do."""
    alike, unlike = bell(64, 64, 9), bell(64, 64, 9 * SCALES[:64])
    _, shrinkage, levels = _analysis(alike)
    assert abs(levels.astype(int)).sum() <= 3 and shrinkage >= 5
    assert _analysis(unlike)[1] <= 4 and np.ptp(_analysis(unlike.T)[2]) >= 3


def test_rows_that_are_nearly_the_same_cost_their_differences():
    rng = np.random.default_rng(3)
    table = codes_of(rng.normal(0, 30, (400, 64)))
    plain = round_trip([table], [0])
    table[rng.permutation(400)[:80]] = codes_of(table[5] + rng.normal(0, 0.4, (80, 64)))
    assert round_trip([table], [0]) < 0.86 * plain
    assert round_trip([np.ascontiguousarray(table[:60])], [0]) < 60 * plain / 400


def test_matrices_of_a_group_learn_from_each_other():
    rng = np.random.default_rng(7)
    shape = rng.geometric(0.2, (64, 64)) * rng.choice([-3, 3], (64, 64))
    matrices = [codes_of(shape, 90), codes_of(shape[::-1], 90)]
    assert sum(code_lengths(matrices, [0, 0])) < 0.97 * sum(code_lengths(matrices, [0, 1]))


def test_magnitude_bits_are_what_the_coder_takes():
    codes = bell(256, 192, 6 * np.exp(0.5 * np.random.default_rng(7).standard_normal((256, 1))))
    contexts, bits = magnitude_bits(codes)
    assert contexts.shape == codes.shape and bits.shape == (CONTEXTS, 128)
    total = bits[contexts, abs(codes.astype(int))].sum()
    assert total == pytest.approx(code_lengths([codes], [0])[0], rel=0.02)
    probability = np.exp2(-bits)
    assert np.allclose(probability[:, 0] + 2 * probability[:, 1:].sum(axis=1), 1)
    # Rows with larger codes are in contexts where large codes are cheaper.
    means = abs(codes.astype(int)).mean(axis=1)
    wide, narrow = contexts[means.argmax(), 100], contexts[means.argmin(), 100]
    assert bits[wide, 20] < bits[narrow, 20] and bits[wide, 0] > bits[narrow, 0]
    transposed, _ = magnitude_bits(np.ascontiguousarray(codes.T))
    assert transposed.shape == (192, 256)


def test_frequencies_of_used_codes_are_positive_and_add_up():
    model = WeightModel()
    tables = model.codes[0]
    for largest in (0, 1, 31, 127, 128):
        tables.ready(largest)
        frequency = np.diff(tables.start).reshape(CONTEXTS, SYMBOLS)
        assert (frequency.sum(axis=1) == 1 << 16).all() and (frequency >= 0).all()
        used = frequency[:, max(128 - largest, 0) : 129 + largest]
        assert (used > 0).all() and (used.sum(axis=1) == 1 << 16).all()
