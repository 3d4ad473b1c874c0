"""Brotli (RFC 7932): one stream, without the large windows that go beyond the RFC."""

import brotli

from pgolf.errors import ArtifactError

LARGEST_WINDOW = 24  # log2 of bytes: the RFC's largest, which is what the decoder may take
PIECE = 1 << 16  # bytes decoded at a time


def compress(data: bytes, level: int) -> bytes:
    """Compress with quality `level`, 0 to 11."""
    return brotli.compress(data, quality=level, lgwin=LARGEST_WINDOW)


def decompress(data: bytes | memoryview, size: int) -> bytearray:
    """Decode one stream of exactly `size` bytes, piece by piece: a bomb stops at `size`.

    Raises:
        ArtifactError: damaged data, another size, or trailing bytes.
    """
    decoder, decoded, piece = brotli.Decompressor(), bytearray(), data
    try:
        while not decoder.is_finished():
            part = decoder.process(piece, output_buffer_limit=PIECE)
            piece = b""
            decoded += part
            if len(decoded) > size:
                raise ArtifactError(f"the brotli body holds more than the declared {size} bytes")
            if not part and not decoder.is_finished() and decoder.can_accept_more_data():
                raise ArtifactError(
                    f"the brotli body ends early, at {len(decoded)} of {size} bytes"
                )
    except brotli.error as e:
        raise ArtifactError(f"the brotli body is damaged, or bytes follow it: {e}") from None
    if len(decoded) != size:
        raise ArtifactError(f"the brotli body holds {len(decoded)} bytes, declared are {size}")
    return decoded
