"""cvt: between number formats."""

import numpy as np

from .faults import Unsupported
from .formats import VALUES, canonical, flush, round_bf16, round_tf32
from .table import instruction

WHOLE_ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt", "rn rna rz rni rzi rmi rpi ftz sat")
def cvt(warp, ins, lanes) -> None:
    to, source = ins.types
    modes = set(ins.parts) & {"rn", "rna", "rz", *WHOLE_ROUNDINGS}
    if to in ("bf16x2", "f16x2"):
        _pair(warp, ins, lanes, to, modes)
        return
    value = warp.read(ins.operands[1], source)
    floating = {"from": _is_float(source), "to": _is_float(to)}
    if "ftz" in ins.parts and source == "f32":
        value = flush(value)
    with np.errstate(all="ignore"):
        if floating["to"]:
            result = _to_float(ins, value, floating["from"], to, modes)
        elif floating["from"]:
            result = _to_whole(ins, value, to, modes)
        else:
            result = _between_whole(value, to, "sat" in ins.parts)
    warp.write(ins.operands[0], result, lanes, to if to == "bf16" else "")


def _is_float(kind: str) -> bool:
    return kind[0] == "f" or kind in ("bf16", "tf32")


def _pair(warp, ins, lanes, to: str, modes: set[str]) -> None:
    """Two float32 into the upper and the lower half."""
    if modes != {"rn"} or ins.types[1] != "f32" or "sat" in ins.parts:
        raise Unsupported(f"`{ins.text}`")
    upper, lower = (warp.read(operand, "f32") for operand in ins.operands[1:3])
    with np.errstate(all="ignore"):
        if to == "bf16x2":
            halves = round_bf16(upper), round_bf16(lower)
        else:
            halves = [canonical(x.astype(np.float16)).view(np.uint16) for x in (upper, lower)]
    warp.write(ins.operands[0], halves[0].astype(np.uint32) << np.uint32(16) | halves[1], lanes)


def _to_float(ins, value, from_float: bool, to: str, modes: set[str]) -> np.ndarray:
    if to == "tf32":
        if modes <= {"rna"} or modes == {"rn"}:
            return round_tf32(value, away="rn" not in modes)
        raise Unsupported(f"`{ins.text}`")
    if from_float and modes & WHOLE_ROUNDINGS.keys():
        (mode,) = modes
        value = WHOLE_ROUNDINGS[mode](value)
    elif not modes <= {"rn"}:
        raise Unsupported(f"`{ins.text}`")
    if to == "bf16":
        return value if value.dtype == np.float32 else value.astype(np.float64)
    dtype = VALUES[to]
    result = value.astype(dtype)
    if "sat" in ins.parts:
        result = np.where(np.isnan(result), dtype(0), np.clip(result, dtype(0), dtype(1)))
    if "ftz" in ins.parts and to == "f32":
        result = flush(result)
    return canonical(result)


def _to_whole(ins, value, to: str, modes: set[str]) -> np.ndarray:
    """Values beyond the range become its ends, NaN becomes 0."""
    if len(modes) != 1 or not modes <= WHOLE_ROUNDINGS.keys():
        raise Unsupported(f"`{ins.text}`")
    (mode,) = modes
    limits = np.iinfo(VALUES[to])
    whole = WHOLE_ROUNDINGS[mode](value.astype(np.float64))
    whole = np.where(np.isnan(whole), 0, whole)
    result = np.clip(whole, limits.min, limits.max)
    exact = np.where(result >= float(limits.max), 0, result).astype(VALUES[to])
    return np.where(result >= float(limits.max), VALUES[to](limits.max), exact)


def _between_whole(value: np.ndarray, to: str, saturate: bool) -> np.ndarray:
    dtype = np.dtype(VALUES[to])
    if saturate:
        limits, own = np.iinfo(dtype), np.iinfo(value.dtype)
        value = np.clip(value, max(limits.min, own.min), min(limits.max, own.max))
    return value.astype(dtype)
