"""Every codec: exact round trip, and a bounded decoder that takes exactly one stream."""

import lzma as stdlib_lzma
import tracemalloc

import numpy as np
import pytest
import zstandard

from pgolf.codecs import CODECS, GENERAL, codec
from pgolf.codecs.lzma import PIECE
from pgolf.errors import ArtifactError

LEVELS = {"zstd": (1, 19, 22), "lzma": (0, 6, 9), "brotli": (0, 5, 11)}
NAMES = GENERAL


def sample(size: int) -> bytes:
    """Like codes of weights: no repeats, but some values are frequent."""
    return np.random.default_rng(size).normal(32, 8, size).astype(np.uint8).tobytes()


def test_every_codec_has_a_module_and_an_id_of_its_own():
    assert len(set(CODECS.values())) == len(CODECS)
    assert all(callable(codec(name).decompress) for name in CODECS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0, 1, 2, 4095, 4097, 70_000])
def test_round_trip_and_determinism(name: str, size: int):
    data = sample(size)
    for level in LEVELS[name]:
        packed = codec(name).compress(data, level)
        assert codec(name).decompress(packed, size) == data
        assert codec(name).compress(data, level) == packed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [-1, 1, 1000])
def test_another_size_is_refused(name: str, wrong: int):
    packed = codec(name).compress(sample(5000), 9)
    with pytest.raises(ArtifactError, match=str(5000 + wrong)):
        codec(name).decompress(packed, 5000 + wrong)


def test_zstd_is_never_larger_than_at_its_literal_level():
    """Codes of weights hardly repeat, and the search of high levels then loses to plain Huffman."""
    data = sample(200_000)
    literal = len(zstandard.ZstdCompressor(level=1).compress(data))
    assert len(zstandard.ZstdCompressor(level=22).compress(data)) > literal
    assert len(codec("zstd").compress(data, 22)) == literal
    text = b"the same words again and again, " * 50 + data[:2000] + data[:2000]
    searched = len(zstandard.ZstdCompressor(level=22).compress(text))
    assert len(codec("zstd").compress(text, 22)) == searched


@pytest.mark.parametrize("name", NAMES)
def test_every_truncation_is_refused(name: str):
    packed = codec(name).compress(sample(300), 9)
    for end in range(len(packed)):
        with pytest.raises(ArtifactError):
            codec(name).decompress(packed[:end], 300)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tail", [b"\0", b"junk", "again"])
def test_trailing_bytes_and_second_streams_are_refused(name: str, tail):
    packed = codec(name).compress(sample(300), 9)
    with pytest.raises(ArtifactError):
        codec(name).decompress(packed + (packed if tail == "again" else tail), 300)


def test_zstd_without_content_size_is_refused():
    packed = zstandard.ZstdCompressor(write_content_size=False).compress(sample(300))
    with pytest.raises(ArtifactError, match="does not declare"):
        codec("zstd").decompress(packed, 300)


def test_zstd_window_larger_than_the_content_is_refused():
    # Frame header: not one segment, 4-byte content size, window of 2^31 bytes; then a raw block.
    header = b"\x28\xb5\x2f\xfd" + bytes([0b1000_0000, 21 << 3]) + (3).to_bytes(4, "little")
    block = ((3 << 3) | 1).to_bytes(3, "little") + b"abc"
    assert zstandard.get_frame_parameters(header + block).window_size == 1 << 31
    with pytest.raises(ArtifactError, match="does not declare"):
        codec("zstd").decompress(header + block, 3)
    small = header[:5] + bytes([0]) + header[6:]  # a window of 1 kB is zstd's least: fine
    assert codec("zstd").decompress(small + block, 3) == b"abc"


def test_zstd_skippable_frame_is_refused():
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    with pytest.raises(ArtifactError, match="not a zstd frame"):
        codec("zstd").decompress(skippable, 3)
    packed = codec("zstd").compress(b"abc", 1)
    with pytest.raises(ArtifactError):
        codec("zstd").decompress(packed + skippable, 3)


def test_zstd_dictionary_frame_is_refused():
    raw = zstandard.DICT_TYPE_RAWCONTENT
    dictionary = zstandard.ZstdCompressionDict(sample(4000), dict_type=raw)
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(sample(4000)[:900])
    with pytest.raises(ArtifactError):
        codec("zstd").decompress(packed, 900)


@pytest.mark.parametrize("name", ["lzma", "brotli"])
def test_a_bomb_stops_at_the_declared_size(name: str):
    packed = codec(name).compress(bytes(20_000_000), 5)
    assert len(packed) < 10_000
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match="more than the declared 1000"):
            codec(name).decompress(packed, 1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["lzma", "brotli"])
@pytest.mark.parametrize("size", [PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
def test_data_of_about_a_piece(name: str, size: int):
    packed = codec(name).compress(bytes(size), 1)
    assert codec(name).decompress(packed, size) == bytes(size)
    for wrong in (size - 1, size + 1):
        with pytest.raises(ArtifactError):
            codec(name).decompress(packed, wrong)
    for other in (packed[:-1], packed + b"\0", packed + packed):
        with pytest.raises(ArtifactError):
            codec(name).decompress(other, size)


def test_brotli_with_a_large_window_is_refused():
    """A few bytes could take a GiB. 0x11: the extension; 0x1e: a window of 2^30."""
    with pytest.raises(ArtifactError, match="damaged"):
        codec("brotli").decompress(b"\x11\x1e\x03", 0)


def test_lzma_dictionary_is_no_larger_than_the_data():
    """Python's lzma allocates through Python, so tracemalloc sees the dictionary."""
    filters = [{"id": stdlib_lzma.FILTER_LZMA2, "preset": 9}]  # made with one of 64 MiB
    data = sample(10_000)
    packed = stdlib_lzma.compress(data, format=stdlib_lzma.FORMAT_RAW, filters=filters)
    tracemalloc.start()
    try:
        assert codec("lzma").decompress(packed, len(data)) == data
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
