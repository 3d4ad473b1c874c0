"""LZMA2 as a raw stream: the artifact has its own header and checksum.

Encoder and decoder both derive the dictionary from the size of the data, so decoding takes no more
memory than that, whatever a file says.
"""

import lzma

from pgolf.errors import ArtifactError

LEAST_DICTIONARY, LARGEST_DICTIONARY = 1 << 12, 1 << 26  # liblzma's least; that of preset 9
PIECE = 1 << 16  # bytes decoded at a time


def _filters(size: int, **preset: int) -> list[dict[str, int]]:
    dictionary = min(max(size, LEAST_DICTIONARY), LARGEST_DICTIONARY)
    return [{"id": lzma.FILTER_LZMA2, "dict_size": dictionary, **preset}]


def compress(data: bytes, level: int) -> bytes:
    """Compress with preset `level`, 0 to 9, in its slower and smaller form."""
    filters = _filters(len(data), preset=level | lzma.PRESET_EXTREME)
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters)


def decompress(data: bytes | memoryview, size: int) -> bytearray:
    """Decode one stream of exactly `size` bytes, piece by piece: a bomb stops at `size`.

    Raises:
        ArtifactError: damaged data, another size, or trailing bytes.
    """
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_filters(size))
    decoded, piece = bytearray(), data
    try:
        while not decoder.eof and len(decoded) <= size:
            part = decoder.decompress(piece, max_length=PIECE)
            piece = b""
            decoded += part
            if not part and decoder.needs_input:
                break
    except lzma.LZMAError as e:
        raise ArtifactError(f"the lzma body is damaged: {e}") from None
    if len(decoded) > size:
        raise ArtifactError(f"the lzma body holds more than the declared {size} bytes")
    if not decoder.eof:
        raise ArtifactError(f"the lzma body ends early, at {len(decoded)} of {size} bytes")
    if len(decoded) != size or decoder.unused_data:
        raise ArtifactError(
            f"the lzma body holds {len(decoded)} bytes and {len(decoder.unused_data)} trailing "
            f"ones, declared are {size}"
        )
    return decoded
