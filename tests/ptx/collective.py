"""What lanes do together: barriers, shuffles, votes, reductions over a warp."""

import numpy as np

from .faults import Divergence, Fault, Unsupported
from .parser import Immediate, Vector
from .table import instruction


@instruction("bar.sync bar.cta.sync barrier.sync barrier.cta.sync", "aligned")
def barrier(warp, ins, lanes) -> None:
    """The block's one barrier; named barriers and those of some threads are not known."""
    threads = 32 * len(warp.block.warps)
    name, *count = ins.operands
    if not isinstance(name, Immediate) or name.bits != 0:
        raise Unsupported(f"`{ins.text}`: only barrier 0")
    if count and (not isinstance(count[0], Immediate) or count[0].bits != threads):
        raise Unsupported(f"`{ins.text}`: a barrier of some threads")
    warp.expect_all_lanes(lanes)
    warp.waiting = True


@instruction("bar.warp.sync")
def warp_barrier(warp, ins, lanes) -> None:
    _members(warp, ins.operands[0], lanes)


def _members(warp, operand, lanes: np.ndarray) -> np.ndarray:
    """(lanes, 32): the lanes that each active lane names, all of which have to be here.

    Raises:
        Divergence: a lane that was named is elsewhere, or a lane does not name itself.
    """
    masks = warp.read(operand, "b32")
    named = (masks[:, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(bool)
    for lane in np.flatnonzero(lanes):
        if not named[lane, lane]:
            raise Divergence(f"lane {lane} is not in its own mask {masks[lane]:#x}")
        if (named[lane] & ~lanes).any():
            missing = np.flatnonzero(named[lane] & ~lanes).tolist()
            raise Divergence(f"lanes {missing} of the mask {masks[lane]:#x} are not here")
        if (masks[named[lane]] != masks[lane]).any():
            raise Divergence(f"lanes of the mask {masks[lane]:#x} give other masks")
    return named


@instruction("shfl.sync", "idx bfly up down")
def shuffle(warp, ins, lanes) -> None:
    """d|p = a of another lane of the segment; p says whether there is one."""
    mode = ins.parts[2]
    target, value, move, bounds, mask = ins.operands
    named = _members(warp, mask, lanes)
    value = warp.read(value, "b32")
    move = warp.read(move, "u32").astype(np.int64) & 31
    bounds = warp.read(bounds, "u32").astype(np.int64)
    lane = np.arange(32)
    clamp, segment = bounds & 31, bounds >> 8 & 31
    last, first = lane & segment | clamp & ~segment, lane & segment
    source = {
        "up": lane - move,
        "down": lane + move,
        "bfly": lane ^ move,
        "idx": first | move & ~segment,
    }[mode]
    there = source >= last if mode == "up" else source <= last
    source = np.where(there, source, lane)
    if (lanes & ~named[lane, source]).any():
        raise Divergence("a lane is read that the mask does not name")
    results = target.items if isinstance(target, Vector) else (target,)
    warp.write(results[0], value[source], lanes)
    if len(results) == 2:
        warp.write(results[1], there, lanes)


@instruction("vote.sync", "ballot any all uni")
def vote(warp, ins, lanes) -> None:
    target, source, mask = ins.operands
    value = warp.read(source, "pred")
    named = _members(warp, mask, lanes)
    ballots = (named & value) @ (1 << np.arange(32, dtype=np.int64))
    masks = named @ (1 << np.arange(32, dtype=np.int64))
    if ins.parts[2] == "ballot":
        warp.write(target, ballots.astype(np.uint32), lanes)
        return
    everyone, nobody = ballots == masks, ballots == 0
    result = {"any": ~nobody, "all": everyone, "uni": everyone | nobody}[ins.parts[2]]
    warp.write(target, result, lanes)


@instruction("activemask")
def activemask(warp, ins, lanes) -> None:
    bits = int(lanes @ (1 << np.arange(32, dtype=np.int64)))
    warp.write(ins.operands[0], np.full(32, bits, np.uint32), lanes)


REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@instruction("redux.sync", " ".join(REDUCTIONS))
def reduce(warp, ins, lanes) -> None:
    (kind,) = ins.types
    if kind[0] not in "usb":
        raise Unsupported(f"`{ins.text}`")
    value = warp.read(ins.operands[1], kind)
    named = _members(warp, ins.operands[2], lanes)
    combine = REDUCTIONS[ins.parts[2]]
    result = value.copy()
    for lane in np.flatnonzero(lanes):
        result[lane] = combine.reduce(value[named[lane]])
    warp.write(ins.operands[0], result, lanes)


@instruction("trap")
def trap(warp, ins, lanes) -> None:
    raise Fault("the kernel stopped itself")
