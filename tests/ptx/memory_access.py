"""Loads and stores."""

import numpy as np

from .faults import Unsupported
from .formats import BITS, SIGNED
from .memory import SHARED_WINDOW, check_alignment
from .parser import SIZES, Vector
from .table import instruction

SPACES = ("global", "shared", "shared::cta", "param")
WIDTHS = {"v2": 2, "v4": 4, "v8": 8}
MODIFIERS = f"{' '.join(SPACES)} {' '.join(WIDTHS)} volatile relaxed weak cta gpu sys"


def _space(ins, addresses: np.ndarray) -> tuple[str, np.ndarray]:
    """The address space, which a generic address itself says, and the addresses in it."""
    for space in SPACES:
        if space in ins.parts:
            return space.removesuffix("::cta"), addresses
    shared = addresses >= np.uint64(SHARED_WINDOW)
    if shared.all():
        return "shared", addresses - np.uint64(SHARED_WINDOW)
    if shared.any():
        raise Unsupported("generic addresses of two memories in one access")
    return "global", addresses


@instruction("ld", f"{MODIFIERS} nc ca cg cs lu cv")
def load(warp, ins, lanes) -> None:
    (kind,) = ins.types
    target, source = ins.operands
    targets = target.items if isinstance(target, Vector) else (target,)
    size = SIZES[kind]
    space, addresses = _space(ins, warp.address(source)[lanes])
    check_alignment(addresses, size * len(targets))
    if space == "shared":
        data = warp.shared.load(addresses, size * len(targets), warp.index)
    elif space == "global":
        data = warp.memory.load(addresses, size * len(targets), warp.block.index)
    else:
        data = warp.parameters.load(addresses, size * len(targets))
    dtype = SIGNED[size] if kind[0] == "s" else BITS[size]
    values = np.zeros((len(lanes), len(targets)), dtype)
    values[lanes] = np.ascontiguousarray(data).view(dtype)
    for i, register in enumerate(targets):
        warp.write(register, np.ascontiguousarray(values[:, i]), lanes)


@instruction("st", f"{MODIFIERS} wb cg cs wt")
def store(warp, ins, lanes) -> None:
    (kind,) = ins.types
    target, source = ins.operands
    sources = source.items if isinstance(source, Vector) else (source,)
    size = SIZES[kind]
    space, addresses = _space(ins, warp.address(target)[lanes])
    check_alignment(addresses, size * len(sources))
    columns = [warp.read(item, f"b{8 * size}") for item in sources]
    data = np.stack(columns, axis=1)[lanes].view(np.uint8)
    if space == "shared":
        warp.shared.store(addresses, data, warp.index)
    elif space == "global":
        warp.memory.store(addresses, data, warp.block.index)
    else:
        raise Unsupported(f"`{ins.text}`")
