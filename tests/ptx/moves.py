"""Moves, selections and comparisons."""

import numpy as np

from .faults import Unsupported
from .memory import SHARED_WINDOW
from .parser import SIZES, Vector
from .table import instruction


@instruction("mov")
def mov(warp, ins, lanes) -> None:
    (kind,) = ins.types
    target, source = ins.operands
    if kind == "pred":
        warp.write(target, warp.read(source, "pred"), lanes)
    elif isinstance(target, Vector):
        _unpack(warp, target.items, warp.read(source, f"b{8 * SIZES[kind]}"), lanes)
    elif isinstance(source, Vector):
        warp.write(target, _pack(warp, source.items, SIZES[kind]), lanes)
    else:
        warp.write(target, warp.read(source, f"b{8 * SIZES[kind]}"), lanes)


def _unpack(warp, targets, value: np.ndarray, lanes: np.ndarray) -> None:
    size = value.itemsize // len(targets)
    parts = np.ascontiguousarray(value).view(f"u{size}").reshape(-1, len(targets))
    for i, target in enumerate(targets):
        warp.write(target, np.ascontiguousarray(parts[:, i]), lanes)


def _pack(warp, sources, size: int) -> np.ndarray:
    part = size // len(sources)
    columns = [warp.read(source, f"b{8 * part}") for source in sources]
    return np.stack(columns, axis=1).view(f"u{size}").reshape(-1)


@instruction("cvta", "to global shared param")
def cvta(warp, ins, lanes) -> None:
    """Generic addresses are those of global memory; shared memory has a window of its own."""
    target, source = ins.operands
    value = warp.read(source, "u64")
    if "shared" in ins.parts:
        window = np.uint64(SHARED_WINDOW)
        value = value - window if "to" in ins.parts else value + window
    warp.write(target, value, lanes)


@instruction("selp")
def selp(warp, ins, lanes) -> None:
    (kind,) = ins.types
    kind = f"b{8 * SIZES[kind]}"
    target, yes, no, condition = ins.operands
    chosen = np.where(warp.read(condition, "pred"), warp.read(yes, kind), warp.read(no, kind))
    warp.write(target, chosen, lanes)


ORDERED = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
UNSIGNED = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
EQUAL = {"eq": np.equal, "ne": np.not_equal}
COMPARISONS = f"{' '.join([*ORDERED, *UNSIGNED, *EQUAL])} num nan equ neu ltu leu gtu geu"


@instruction("setp", f"{COMPARISONS} and or xor ftz")
def setp(warp, ins, lanes) -> None:
    """p|q = a compared with b, joined to a predicate c if there is one; q with its opposite."""
    (kind,) = ins.types
    name = ins.parts[1]
    result = compare(name, kind, warp.read(ins.operands[1], kind), warp.read(ins.operands[2], kind))
    opposite = ~result
    if len(ins.operands) == 4:
        join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[ins.parts[2]]
        third = warp.read(ins.operands[3], "pred")
        result, opposite = join(result, third), join(opposite, third)
    target = ins.operands[0]
    if isinstance(target, Vector):
        warp.write(target.items[1], opposite, lanes)
        target = target.items[0]
    warp.write(target, result, lanes)


def compare(name: str, kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Ordered comparisons are false where one side is NaN, those that end in u are true."""
    if kind[0] not in "fb" or kind.startswith("b") and name in EQUAL and kind != "bf16":
        known = ORDERED | EQUAL | (UNSIGNED if kind[0] == "u" else {})
        if name not in known:
            raise Unsupported(f"setp.{name}.{kind}")
        return known[name](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return unordered if name == "nan" else ~unordered
    if len(name) == 3:
        return (ORDERED | EQUAL)[name[:2]](a, b) | unordered
    return (ORDERED | EQUAL)[name](a, b) & ~unordered
