"""Whole numbers and bits."""

import numpy as np

from .faults import Unsupported
from .formats import BITS
from .parser import SIZES
from .table import instruction


def operands(warp, ins, kind: str) -> list[np.ndarray]:
    return [warp.read(operand, kind) for operand in ins.operands[1:]]


def add(a, b):
    return a + b


def subtract(a, b):
    return a - b


def divide(a, b):
    """Towards zero; a division by zero gives all ones, as the hardware does."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient += ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient)


def remainder(a, b):
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, a, a - divide(a, safe) * safe)


def wide(a: np.ndarray) -> np.ndarray:
    return a.astype(np.dtype(f"{a.dtype.kind}{2 * a.itemsize}"))


def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product."""
    if a.itemsize < 8:
        return (wide(a) * wide(b) >> wide(a).dtype.type(8 * a.itemsize)).astype(a.dtype)
    products = [int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]
    return np.array([p % 2**64 for p in products], np.uint64).view(a.dtype)


ARITHMETIC = {"add": add, "sub": subtract, "div": divide, "rem": remainder}
ARITHMETIC |= {"min": np.minimum, "max": np.maximum, "abs": np.abs, "neg": np.negative}


def arithmetic(warp, ins, lanes) -> None:
    (kind,) = ins.types
    if len(ins.parts) != 2:
        raise Unsupported(f"`{ins.text}`")
    with np.errstate(over="ignore"):
        warp.write(ins.operands[0], ARITHMETIC[ins.parts[0]](*operands(warp, ins, kind)), lanes)


def multiply(warp, ins, lanes) -> None:
    """mul and mad of whole numbers: the lower half, the upper half or both of the product."""
    (kind,) = ins.types
    which = ins.parts[1]
    a, b = (warp.read(operand, kind) for operand in ins.operands[1:3])
    if which == "wide":
        product = wide(a) * wide(b)
        kind = f"{kind[0]}{8 * product.itemsize}"
    else:
        product = a * b if which == "lo" else high(a, b)
    if ins.parts[0] == "mad":
        product = product + warp.read(ins.operands[3], kind)
    warp.write(ins.operands[0], product, lanes)


@instruction("mad", "lo hi wide")
def mad(warp, ins, lanes) -> None:
    multiply(warp, ins, lanes)


@instruction("rem")
def rem(warp, ins, lanes) -> None:
    arithmetic(warp, ins, lanes)


BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction("and or xor not cnot")
def bitwise(warp, ins, lanes) -> None:
    (kind,) = ins.types
    values = operands(warp, ins, kind)
    if ins.parts[0] == "not":
        result = ~values[0]
    elif ins.parts[0] == "cnot":
        result = (values[0] == 0).astype(values[0].dtype)
    else:
        result = BITWISE[ins.parts[0]](*values)
    warp.write(ins.operands[0], result, lanes)


@instruction("shl shr")
def shift(warp, ins, lanes) -> None:
    """Amounts beyond the width shift everything out; a signed shr fills with the sign."""
    (kind,) = ins.types
    value, amount = warp.read(ins.operands[1], kind), warp.read(ins.operands[2], "u32")
    width = 8 * value.itemsize
    beyond = amount >= width
    step = np.minimum(amount, width - 1).astype(value.dtype)
    if ins.parts[0] == "shl":
        result = np.where(beyond, value.dtype.type(0), value << step)
    else:
        result = value >> step
        if kind[0] != "s":
            result = np.where(beyond, value.dtype.type(0), result)
    warp.write(ins.operands[0], result, lanes)


@instruction("shf", "l r wrap clamp")
def funnel(warp, ins, lanes) -> None:
    """32 of the 64 bits of (b, a) after a shift to the left or right."""
    low, high_bits = (warp.read(operand, "b32").astype(np.uint64) for operand in ins.operands[1:3])
    amount = warp.read(ins.operands[3], "u32").astype(np.uint64)
    amount = amount & np.uint64(31) if "wrap" in ins.parts else np.minimum(amount, np.uint64(32))
    both = high_bits << np.uint64(32) | low
    shifted = both << amount >> np.uint64(32) if "l" in ins.parts else both >> amount
    if "l" in ins.parts:  # the upper half, whose bits a shift by 32 would lose
        shifted = np.where(amount == 32, low, shifted)
    warp.write(ins.operands[0], (shifted & np.uint64(2**32 - 1)).astype(np.uint32), lanes)


@instruction("bfe")
def extract(warp, ins, lanes) -> None:
    """`length` bits from `position` on; signed ones are extended by their sign."""
    (kind,) = ins.types
    value = warp.read(ins.operands[1], kind)
    position, length = (_byte(warp.read(operand, "u32")) for operand in ins.operands[2:])
    width = 8 * value.itemsize
    result = np.zeros(len(value), np.uint64)
    sign_at = np.minimum(position + length - 1, width - 1)
    for i in range(len(value)):
        bits = int(value[i]) % 2**width
        found = (bits >> int(position[i])) & ((1 << int(length[i])) - 1)
        have = max(0, min(int(length[i]), width - int(position[i])))
        if kind[0] == "s" and length[i] and bits >> int(sign_at[i]) & 1:
            found |= (2**width - 1) & ~((1 << have) - 1)
        result[i] = found
    warp.write(ins.operands[0], result.astype(BITS[value.itemsize]), lanes)


@instruction("bfi")
def insert(warp, ins, lanes) -> None:
    """The lower `length` bits of a put into b at `position`."""
    (kind,) = ins.types
    a, b = (warp.read(operand, kind) for operand in ins.operands[1:3])
    position, length = (_byte(warp.read(operand, "u32")) for operand in ins.operands[3:])
    width = 8 * a.itemsize
    result = b.copy()
    for i in range(len(a)):
        mask = ((1 << int(length[i])) - 1) << int(position[i]) & (2**width - 1)
        result[i] = int(b[i]) & ~mask | int(a[i]) << int(position[i]) & mask
    warp.write(ins.operands[0], result, lanes)


def _byte(value: np.ndarray) -> np.ndarray:
    return value.astype(np.int64) & 0xFF


@instruction("lop3")
def lop3(warp, ins, lanes) -> None:
    """Any function of three bits, by its truth table."""
    a, b, c = (warp.read(operand, "b32") for operand in ins.operands[1:4])
    table = ins.operands[4].bits
    result = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    warp.write(ins.operands[0], result, lanes)


@instruction("prmt")
def permute(warp, ins, lanes) -> None:
    """Four of the eight bytes of (b, a); bit 3 of a selector asks for its sign in all bits."""
    a, b, selector = (warp.read(operand, "b32") for operand in ins.operands[1:4])
    data = np.stack([a, b], axis=1).view(np.uint8)
    nibbles = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
    chosen = np.take_along_axis(data, (nibbles & 7).astype(np.int64), axis=1)
    signs = np.where(chosen >= 128, 255, 0)
    chosen = np.where(nibbles & 8, signs, chosen).astype(np.uint8)
    warp.write(ins.operands[0], np.ascontiguousarray(chosen).view(np.uint32)[:, 0], lanes)


@instruction("clz popc brev bfind")
def count_bits(warp, ins, lanes) -> None:
    (kind,) = ins.types
    value = warp.read(ins.operands[1], kind)
    width = 8 * SIZES[kind]
    texts = [f"{int(v) % 2**width:0{width}b}" for v in value]
    if ins.parts[0] == "brev":
        warp.write(ins.operands[0], np.array([int(t[::-1], 2) for t in texts], value.dtype), lanes)
        return
    if ins.parts[0] == "popc":
        counts = [t.count("1") for t in texts]
    elif ins.parts[0] == "clz":
        counts = [len(t) - len(t.lstrip("0")) for t in texts]
    elif kind[0] == "s":
        raise Unsupported(f"`{ins.text}`")
    else:  # the position of the highest 1, all ones if there is none
        counts = [len(t.lstrip("0")) - 1 for t in texts]
    warp.write(ins.operands[0], np.array(counts, np.int64).astype(np.uint32), lanes)
