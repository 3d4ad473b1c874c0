"""cp.async, which copies behind the back of its thread, and fences.

A copy lands as late as it may: when its thread waits for it. Until then its place in shared memory
holds poison, so that a wait that is missing shows, and other warps need a barrier after it.
"""

import numpy as np

from .faults import OutOfBounds, Unsupported
from .memory import POISON, check_alignment
from .table import instruction


@instruction("cp.async", "ca cg shared shared::cta global")
def copy(warp, ins, lanes) -> None:
    """Bytes from global to shared memory; zeros behind the first `given` of them."""
    target, source, size, *given = ins.operands
    size = size.bits
    to = warp.address(target)[lanes]
    count = warp.read(given[0], "u32")[lanes].astype(np.int64) if given else np.full(len(to), size)
    if (count > size).any():
        raise OutOfBounds(f"{count.max()} bytes of {size}")
    check_alignment(to, size)
    data = np.zeros((len(to), size), np.uint8)
    addresses = warp.address(source)[lanes]
    for n in np.unique(count[count > 0]):
        some = count == n
        check_alignment(addresses[some], size)
        data[some, :n] = warp.memory.load(addresses[some], int(n), warp.block.index)
    index = warp.shared.places(to, size)
    warp.shared.note_write(index, warp.index)
    warp.shared.bytes[index] = POISON
    warp.copies.append((index, data))


@instruction("cp.async.commit_group")
def commit(warp, ins, lanes) -> None:
    warp.expect_all_lanes(lanes)
    warp.copy_groups.append(warp.copies)
    warp.copies = []


@instruction("cp.async.wait_group")
def wait_group(warp, ins, lanes) -> None:
    warp.expect_all_lanes(lanes)
    _land(warp, ins.operands[0].bits)


@instruction("cp.async.wait_all")
def wait_all(warp, ins, lanes) -> None:
    commit(warp, ins, lanes)
    _land(warp, 0)


def _land(warp, keep: int) -> None:
    """All groups but the `keep` youngest."""
    while len(warp.copy_groups) > keep:
        for index, data in warp.copy_groups.pop(0):
            warp.shared.note_write(index, warp.index)
            warp.shared.bytes[index] = data


@instruction("fence.proxy.async", "shared::cta global")
def proxy_fence(warp, ins, lanes) -> None:
    """What was written to shared memory can be read by wgmma."""
    if "global" not in ins.parts:
        warp.shared.fence(warp.index)


@instruction("membar fence", "cta gl gpu sys sc acq_rel")
def fence(warp, ins, lanes) -> None:
    """The order of accesses: here they are in order anyway."""


@instruction("cp.async.bulk mbarrier")
def bulk(warp, ins, lanes) -> None:
    raise Unsupported(f"`{ins.text}`: TMA and mbarriers are left out")
