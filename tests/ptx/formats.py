"""Number formats: bits in registers to numbers that numpy computes with, and back.

Registers hold bits. A value of a type is a numpy array of that type; bf16 and tf32, which numpy
does not know, are held as float32.
"""

from fractions import Fraction

import numpy as np

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # bytes -> what a register holds
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
VALUES = {
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
NAN = {np.float16: 0x7FFF, np.float32: 0x7FFFFFFF}  # what arithmetic makes, whatever it was given


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 as float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16, ties to even; one NaN for all."""
    bits = _odd_float32(x).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def round_tf32(x: np.ndarray, away: bool) -> np.ndarray:
    """float32 with 10 bits of mantissa: the nearest, ties away from zero or to even."""
    bits = x.view(np.uint32)
    even = np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))
    bias = np.uint32(0x1000) if away else even
    return np.where(np.isfinite(x), truncate_tf32((bits + bias).view(np.float32)), x)


def truncate_tf32(x: np.ndarray) -> np.ndarray:
    """What a tensor core reads of a float32: the lower 13 bits are ignored."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c as float64, rounded to odd: rounding that once more gives the correct result.

    For operands of float32 or less, whose product is exact in float64. Rounding to odd keeps in the
    last bit that something was lost (Boldo and Melquiond, 2008).
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)  # exact: Knuth's two-sum
    even = total.view(np.int64) & 1 == 0
    towards = np.where(lost > 0, np.inf, -np.inf)
    return np.where(np.isfinite(total) & (lost != 0) & even, np.nextafter(total, towards), total)


def exact_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of float64, rounded once; slow."""
    result = a * b + c
    for i in np.flatnonzero(np.isfinite(result)):
        exact = Fraction(a[i]) * Fraction(b[i]) + Fraction(c[i])
        if exact:  # a zero keeps the sign that it has
            result[i] = float(exact)
    return result


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 become zeros of their sign (.ftz)."""
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), x), x)


def canonical(x: np.ndarray) -> np.ndarray:
    """The same with the one NaN that the hardware makes."""
    missing = np.isnan(x)
    if x.dtype.type in NAN and missing.any():
        bits = x.view(BITS[x.itemsize])
        return np.where(missing, BITS[x.itemsize](NAN[x.dtype.type]), bits).view(x.dtype)
    return x


def disturbed(exact: np.ndarray, ulps: int, *operands: np.ndarray) -> np.ndarray:
    """float32 of what an instruction gives that may be off by so many units in the last place.

    No GPU's table of such an instruction is known here, so that the error is any of those that PTX
    allows: a fixed function of the operands' bits decides. Zeros, infinities, NaN and subnormal
    results are left as they are.
    """
    rounded = exact.astype(np.float32)
    key = np.zeros(rounded.shape, np.uint64)
    for operand in operands:
        key = (key ^ operand.view(np.uint32)) * np.uint64(0x9E3779B97F4A7C15)
    step = (key >> np.uint64(33)) % np.uint64(2 * ulps + 1)
    moved = (rounded.view(np.int32) + step.astype(np.int32) - np.int32(ulps)).view(np.float32)
    usual = np.isfinite(moved) & (np.abs(rounded) > 2 * np.finfo(np.float32).tiny)
    usual &= np.isfinite(rounded)
    return np.where(usual, moved, rounded)


def _odd_float32(x: np.ndarray) -> np.ndarray:
    """float32 of float64, rounded to odd, so that rounding it again is as good as once."""
    near = np.ascontiguousarray(x, np.float32)
    if x.dtype == np.float32:
        return near
    lost = x - near.astype(np.float64)
    even = near.view(np.uint32) & 1 == 0
    towards = np.where(lost > 0, np.float32(np.inf), np.float32(-np.inf))
    return np.where(np.isfinite(near) & (lost != 0) & even, np.nextafter(near, towards), near)
