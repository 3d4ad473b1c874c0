"""Zstandard: one frame that holds the size of its content."""

import zstandard

from pgolf.errors import ArtifactError

MAGIC = b"\x28\xb5\x2f\xfd"
LEAST_WINDOW = 1024  # zstd's own minimum
LITERAL_LEVEL = 1  # hardly looks for repeats


def compress(data: bytes, level: int) -> bytes:
    """Compress with `level`, 1 to 22, or with LITERAL_LEVEL if that is smaller.

    The few repeats in codes of weights are accidents, and taking them costs more than it saves:
    27 M Gaussian weights of 6 bits are 0.4 % smaller at level 1 than at 22, and done at once.
    """
    tries = (zstandard.ZstdCompressor(level=n).compress(data) for n in (level, LITERAL_LEVEL))
    return min(tries, key=len)


def decompress(data: bytes | memoryview, size: int) -> bytearray:
    """Decode one frame of exactly `size` bytes.

    The frame's own claims are checked first, so that neither the result nor the window can take
    more memory than `size`.

    Raises:
        ArtifactError: damaged data, another size, a second frame or trailing bytes.
    """
    if data[:4] != MAGIC:  # zstd would also take a skippable frame here
        raise ArtifactError("the body is not a zstd frame")
    try:
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size != size or frame.window_size > max(size, LEAST_WINDOW):
            raise ArtifactError(f"the zstd frame does not declare the {size} bytes of the header")
        decoded = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise ArtifactError(f"the zstd body is damaged: {e}") from None
    if len(decoded) != size:
        raise ArtifactError(f"the zstd body holds {len(decoded)} bytes, declared are {size}")
    return bytearray(decoded)
