"""Floating-point arithmetic.

What PTX rounds correctly is rounded correctly here. Where it allows an error, the result is off by
some error that it allows (formats.disturbed), not the one of any GPU.
"""

import numpy as np

from . import integer
from .faults import Unsupported
from .formats import (
    canonical,
    disturbed,
    exact_multiply_add,
    flush,
    fused_multiply_add,
    round_bf16,
    widen_bf16,
)
from .table import instruction

ROUNDINGS = "rn rz rm rp"
FLOATS = {"f16", "f32", "f64", "bf16", "f16x2", "bf16x2"}
HALVES = {"f16x2": "f16", "bf16x2": "bf16"}


def _sign_of_zero(a, b, pick):
    """PTX orders -0 below +0, numpy does not."""
    of_zeros = a + b if pick in (np.fmax, np.maximum) else -(-a - b)
    return np.where((a == 0) & (b == 0), of_zeros, pick(a, b))


def minimum(a, b):
    return _sign_of_zero(a, b, np.fmin)


def maximum(a, b):
    return _sign_of_zero(a, b, np.fmax)


def minimum_or_nan(a, b):
    return _sign_of_zero(a, b, np.minimum)


def maximum_or_nan(a, b):
    return _sign_of_zero(a, b, np.maximum)


@instruction("add sub mul fma", f"{ROUNDINGS} ftz sat lo hi wide")
def add_and_multiply(warp, ins, lanes) -> None:
    if ins.types[0] not in FLOATS:
        whole = integer.multiply if ins.parts[0] == "mul" else integer.arithmetic
        whole(warp, ins, lanes)
        return
    apply(warp, ins, lanes, lambda *values: _exact(ins.parts[0], ins.parts, values))


def _exact(name: str, modes: tuple[str, ...], values: tuple[np.ndarray, ...]) -> np.ndarray:
    """The result to nearest, or a float64 that rounds to it whatever the rounding."""
    a, b = values[:2]
    nearest = not {"rz", "rm", "rp"} & set(modes)
    if name == "fma":
        if a.dtype == np.float64:
            return exact_multiply_add(a, b, values[2])
        return fused_multiply_add(a, b, values[2])
    if a.dtype == np.float64 or nearest and a.dtype == np.float32 and "bf16" not in modes:
        return {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name](a, b)
    if name == "mul":
        return a.astype(np.float64) * b.astype(np.float64)
    return fused_multiply_add(a, np.ones_like(a), b if name == "add" else -b)


def apply(warp, ins, lanes, compute) -> None:
    """Read, compute and write, each half of a pair for itself."""
    (kind,) = ins.types
    if kind in HALVES:
        words = [warp.read(operand, "b32") for operand in ins.operands[1:]]
        result = np.zeros_like(words[0])
        for half in (np.uint32(0), np.uint32(16)):
            bits = [(word >> half).astype(np.uint16) for word in words]
            narrow = _rounded(ins, HALVES[kind], compute(*(_value(b, kind) for b in bits)))
            result |= _bits(narrow, kind).astype(np.uint32) << half
        warp.write(ins.operands[0], result, lanes)
        return
    values = [warp.read(operand, kind) for operand in ins.operands[1:]]
    if "ftz" in ins.parts:
        values = list(map(flush, values))
    with np.errstate(all="ignore"):
        warp.write(ins.operands[0], _rounded(ins, kind, compute(*values)), lanes, kind)


def _value(bits: np.ndarray, pair: str) -> np.ndarray:
    return widen_bf16(bits) if pair == "bf16x2" else bits.view(np.float16)


def _bits(value: np.ndarray, pair: str) -> np.ndarray:
    return round_bf16(value) if pair == "bf16x2" else value.view(np.uint16)


def _rounded(ins, kind: str, exact: np.ndarray) -> np.ndarray:
    """In the type's precision, as the modifiers say; bf16 stays as it is until it is written."""
    if kind == "bf16":
        return exact
    dtype = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]
    result = exact.astype(dtype)
    if mode := next((part for part in ins.parts if part in ("rz", "rm", "rp")), None):
        if kind != "f32" or ins.parts[0] not in ("add", "sub", "mul", "fma"):
            raise Unsupported(f"`{ins.text}`")
        result = directed(exact, result, mode)
    if "sat" in ins.parts:
        result = np.where(np.isnan(result), dtype(0), np.clip(result, dtype(0), dtype(1)))
    if "ftz" in ins.parts:
        result = flush(result)
    return canonical(result)


def directed(exact: np.ndarray, near: np.ndarray, mode: str) -> np.ndarray:
    """float32 of a float64 rounded down, up or towards zero, from the nearest one."""
    down, up = (np.nextafter(near, np.float32(s * np.inf)) for s in (-1, 1))
    floor = np.where(near.astype(np.float64) > exact, down, near)
    ceiling = np.where(near.astype(np.float64) < exact, up, near)
    if mode == "rz":
        return np.where(exact > 0, floor, ceiling)
    return floor if mode == "rm" else ceiling


@instruction("min max", "NaN ftz xorsign abs")
def extremes(warp, ins, lanes) -> None:
    if ins.types[0] not in FLOATS:
        integer.arithmetic(warp, ins, lanes)
        return
    largest, keeps_nan = ins.parts[0] == "max", "NaN" in ins.parts
    functions = (minimum, maximum, minimum_or_nan, maximum_or_nan)
    pick = functions[largest + 2 * keeps_nan]
    if "xorsign" in ins.parts:  # of the magnitudes, with the sign of the product
        apply(
            warp, ins, lanes,
            lambda a, b: np.copysign(pick(abs(a), abs(b)), np.copysign(1, a) * np.copysign(1, b)),
        )  # fmt: skip
    else:
        apply(warp, ins, lanes, pick)


@instruction("abs neg", "ftz")
def sign(warp, ins, lanes) -> None:
    if ins.types[0] not in FLOATS:
        integer.arithmetic(warp, ins, lanes)
        return
    apply(warp, ins, lanes, np.abs if ins.parts[0] == "abs" else np.negative)


@instruction("copysign")
def copysign(warp, ins, lanes) -> None:
    apply(warp, ins, lanes, lambda sign_of, size: np.copysign(size, sign_of))


@instruction("div", "rn full approx ftz")
def division(warp, ins, lanes) -> None:
    """div.rn is correct; div.full and div.approx may be off by two units in the last place."""
    if ins.types[0] not in FLOATS:
        integer.arithmetic(warp, ins, lanes)
        return

    def divide(a, b):
        if "rn" in ins.parts:
            return a / b
        return disturbed(a.astype(np.float64) / b.astype(np.float64), 2, a, b)

    apply(warp, ins, lanes, divide)


# What is computed, and how many units in the last place the .approx form may be off, by the
# maximum errors that the PTX manual states (rsqrt 2^-22.9, lg2 2^-22, ex2 2^-22.5 of the value).
FUNCTIONS = {
    "rcp": (lambda x: x.dtype.type(1) / x, 1),
    "sqrt": (np.sqrt, 1),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2),
    "ex2": (np.exp2, 2),
    "lg2": (np.log2, 2),
    "tanh": (np.tanh, 2**12),
}


@instruction("rcp sqrt rsqrt ex2 lg2 tanh", "rn approx ftz")
def function(warp, ins, lanes) -> None:
    """Of a float32: correct with .rn, which only rcp and sqrt have, also of a float64."""
    name = ins.parts[0]
    exact, ulps = FUNCTIONS[name]
    rounded = "rn" in ins.parts
    known = ("f32", "f64") if rounded else ("f32",)
    if ins.types[0] not in known or rounded and name not in ("rcp", "sqrt"):
        raise Unsupported(f"`{ins.text}`")

    def compute(x):
        return exact(x) if rounded else disturbed(exact(x.astype(np.float64)), ulps, x)

    apply(warp, ins, lanes, compute)


@instruction("testp", "finite infinite number notanumber normal subnormal")
def classify(warp, ins, lanes) -> None:
    x = warp.read(ins.operands[1], ins.types[0])
    tiny = np.finfo(x.dtype).tiny
    tests = {
        "finite": np.isfinite(x),
        "infinite": np.isinf(x),
        "number": ~np.isnan(x),
        "notanumber": np.isnan(x),
        "normal": np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": (np.abs(x) < tiny) & (x != 0),
    }
    warp.write(ins.operands[0], tests[ins.parts[1]], lanes)
