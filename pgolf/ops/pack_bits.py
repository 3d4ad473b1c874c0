"""pack_bits: signed codes of k bits (4 <= k <= 8) to bytes and back; on the CPU.

Shapes: N codes (int8) <-> ceil(N k / 8) bytes (uint8). Code i is the bits [ik, (i+1)k) of one long
little-endian bit string, in two's complement; the bits that the last byte has left are zero.
Source: our own format; csrc/pack_bits.h is the same formula, eight codes at a time.
"""

import numpy as np
import torch

from pgolf import extension

MIN_BITS, MAX_BITS = 4, 8


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def reference_pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`pack_bits` in numpy, for codes that are known to fit; the truth that kernels are held to."""
    digits = np.unpackbits(codes.numpy().view(np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(np.packbits(digits[:, :bits].ravel(), bitorder="little"))


def reference_unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """`unpack_bits` in numpy, for sizes that are known to fit."""
    digits = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little")
    low = np.packbits(digits.reshape(count, bits), axis=1, bitorder="little")[:, 0]
    sign = np.uint8(1 << (bits - 1))
    return torch.from_numpy(((low ^ sign) - sign).view(np.int8))


def _check(tensor: torch.Tensor, dtype: torch.dtype, name: str, bits: int) -> torch.Tensor:
    """The tensor in one dimension and contiguous, after the checks that both directions share."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}: it has to be {MIN_BITS} to {MAX_BITS}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}: it has to be {dtype}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}: move it with .cpu()")
    return tensor.detach().contiguous().view(-1)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed codes into bytes.

    Args:
        codes: int8 on the CPU, any shape and strides, each in [-2^(bits-1), 2^(bits-1)).
        bits: bits a code takes, 4 to 8.

    Returns:
        uint8 [ceil(codes.numel() * bits / 8)].

    Raises:
        TypeError: `codes` is not int8.
        ValueError: `bits` is out of range, a code does not fit, or `codes` is on a GPU.
    """
    codes = _check(codes, torch.int8, "codes", bits)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if codes.numel() and (codes.min() < low or codes.max() > high):
        at = int(((codes < low) | (codes > high)).nonzero()[0])
        raise ValueError(
            f"code {int(codes[at])} at position {at} does not fit {bits} bits ({low} to {high})"
        )
    module = extension.load()
    if module is None:
        return reference_pack(codes, bits)
    packed = torch.empty(packed_bytes(codes.numel(), bits), dtype=torch.uint8)
    module.pack_bits(codes.data_ptr(), codes.numel(), packed.data_ptr(), packed.numel(), bits)
    return packed


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unpack what `pack_bits` packed.

    Args:
        packed: uint8 on the CPU, ceil(count * bits / 8) elements.
        bits: bits a code takes, 4 to 8.
        count: how many codes there are.

    Returns:
        int8 [count].

    Raises:
        TypeError: `packed` is not uint8.
        ValueError: `bits` or `count` is out of range or does not go with the size of `packed`, or
            `packed` is on a GPU.
    """
    packed = _check(packed, torch.uint8, "packed", bits)
    if count < 0 or packed.numel() != packed_bytes(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits do not take {packed.numel()} bytes"
            + (f" but {packed_bytes(count, bits)}" if count >= 0 else ": the count is negative")
        )
    module = extension.load()
    if module is None:
        return reference_unpack(packed, bits, count)
    codes = torch.empty(count, dtype=torch.int8)
    module.unpack_bits(packed.data_ptr(), packed.numel(), codes.data_ptr(), count, bits)
    return codes
