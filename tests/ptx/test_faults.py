"""Every fault is reported, and the same kernel without it runs."""

import numpy as np
import pytest

from .faults import (
    Divergence,
    Misaligned,
    NoEnd,
    OutOfBounds,
    Pending,
    Race,
    Unsupported,
)
from .test_machine import run

SHARED = ".shared .align 16 .b8 near[512]; .shared .align 16 .b8 far[512];"
TO_SHARED = "mov.u32 %r2, near; shl.b32 %r3, %r1, 2; add.s32 %r2, %r2, %r3;"  # this thread's word
NEIGHBOUR = "xor.b32 %r4, %r3, 128; mov.u32 %r5, near; add.s32 %r5, %r5, %r4;"  # another warp's


def store(register: str = "%r6") -> str:
    return f"st.global.b32 [%rd9], {register};"


@pytest.mark.parametrize(
    ("fault", "body"),
    [
        (OutOfBounds, "ld.global.b32 %r6, [%rd8+256];"),
        (OutOfBounds, "st.global.b32 [%rd9+-4], %r1;"),
        (OutOfBounds, "ld.global.b64 %rd5, [%rd9+8];"),
        (OutOfBounds, f"{TO_SHARED} ld.shared.b32 %r6, [%r2+512];"),  # between two arrays
        (OutOfBounds, f"{TO_SHARED} st.shared.b32 [%r2+-4], %r1;"),
        (OutOfBounds, "ld.param.u64 %rd5, [k_param_1+8];"),
        (Misaligned, "ld.global.b32 %r6, [%rd8+2];"),
        (Misaligned, "ld.global.v2.b32 {%r6, %r7}, [%rd8+4];"),
        (Misaligned, f"{TO_SHARED} ld.shared.v2.b32 {{%r6, %r7}}, [%r2];"),
        (Race, "st.global.b32 [%rd2], %r1;"),  # all lanes to one place
        (Divergence, "setp.lt.u32 %p1, %r1, 7; @%p1 bar.sync 0;"),
        (Divergence, "setp.lt.u32 %p1, %r1, 7; @%p1 bra OUT; bar.sync 0; OUT: mov.u32 %r6, 0;"),
        (Divergence, "setp.lt.u32 %p1, %r1, 7; @%p1 shfl.sync.bfly.b32 %r6, %r1, 1, 31, -1;"),
        (Divergence, "setp.lt.u32 %p1, %r1, 7; @%p1 bar.warp.sync -1;"),
        (Divergence, "shfl.sync.bfly.b32 %r6, %r1, 16, 31, 0xFFFF;"),
        (NoEnd, "AGAIN: bra AGAIN;"),
        (Unsupported, "frobnicate.b32 %r6, %r1;"),
        (Unsupported, "add.weird.s32 %r6, %r1, 1;"),
        (Unsupported, "atom.global.add.u32 %r6, [%rd2], 1;"),
        (Unsupported, "mbarrier.init.shared.b64 [%r1], 1;"),
        (Unsupported, "cp.async.bulk.wait_group 0;"),
        (Unsupported, "bar.sync 1;"),
        (Unsupported, "mov.u32 %r6, %clock;"),
    ],
)
def test_a_fault_is_reported(fault: type, body: str) -> None:
    with pytest.raises(fault):
        run(body, shared=SHARED, limit=1000)


def test_the_message_says_where() -> None:
    wanted = r"k, block \(0, 0, 0\), warp 1: `@%p1 ld.global.b32 %r6, \[%rd8\+256\]`: 4 bytes"
    with pytest.raises(OutOfBounds, match=wanted):
        run("setp.gt.u32 %p1, %r1, 31; @%p1 ld.global.b32 %r6, [%rd8+256];", threads=64)


def test_an_instruction_that_is_not_reached_is_still_named() -> None:
    with pytest.raises(Unsupported, match="the instruction `frobnicate.b32 %r6, %r1`"):
        run("bra OUT; frobnicate.b32 %r6, %r1; OUT: mov.u32 %r6, 0;")


def test_a_barrier_between_two_warps() -> None:
    body = f"""{TO_SHARED} {NEIGHBOUR} st.shared.b32 [%r2], %r1; %s
    ld.shared.b32 %r6, [%r5]; {store()}"""
    out = run(body.replace("%s", "bar.sync 0;"), threads=64, shared=SHARED)
    assert out.tolist() == [i ^ 32 for i in range(64)]
    for seed in range(3):
        with pytest.raises(Race, match="what another warp"):
            run(body.replace("%s", ""), threads=64, shared=SHARED, seed=seed)


def test_a_barrier_before_memory_is_used_again() -> None:
    body = f"""{TO_SHARED} {NEIGHBOUR} st.shared.b32 [%r2], %r1; bar.sync 0;
    ld.shared.b32 %r6, [%r5]; %s st.shared.b32 [%r2], %r6; {store()}"""
    run(body.replace("%s", "bar.sync 0;"), threads=64, shared=SHARED)
    with pytest.raises(Race):
        run(body.replace("%s", ""), threads=64, shared=SHARED)


def test_two_warps_may_write_the_same() -> None:
    body = "mov.u32 %r2, near; st.shared.b32 [%r2], %s;"
    run(body.replace("%s", "7"), threads=64, shared=SHARED)
    with pytest.raises(Race, match="writes what another warp wrote"):
        run("shr.u32 %r3, %r1, 5;" + body.replace("%s", "%r3"), threads=64, shared=SHARED)


def test_shared_memory_is_poison_until_it_is_written() -> None:
    out = run(f"{TO_SHARED} ld.shared.b32 %r6, [%r2]; {store()}", shared=SHARED)
    assert np.isnan(out.astype(np.uint32).view(np.float32)).all()


def test_a_warp_that_has_left_misses_the_barrier() -> None:
    with pytest.raises(Divergence, match="have ended"):
        run("setp.gt.u32 %p1, %r1, 31; @%p1 ret; bar.sync 0;", threads=64)


COPY = """mov.u32 %r2, near; shl.b32 %r3, %r1, 3; add.s32 %r2, %r2, %r3;
cp.async.ca.shared.global [%r2], [%rd8], 8, %s; cp.async.commit_group; %w
ld.shared.b32 %r6, [%r2]; ld.shared.b32 %r7, [%r2+4]; st.global.v2.b32 [%rd9], {%r6, %r7};
cp.async.wait_all;"""


def test_a_copy_lands_when_it_is_waited_for() -> None:
    data = np.arange(64, dtype=np.uint32)
    waited = COPY.replace("%w", "cp.async.wait_group 0;")
    out = run(waited.replace("%s", "8"), data, shared=SHARED)
    assert (out.view(np.uint32) == data).all()
    out = run(waited.replace("%s", "4"), data, shared=SHARED)  # the rest is zeros
    assert (out.view(np.uint32).reshape(-1, 2) == data.reshape(-1, 2) * [1, 0]).all()
    for wait in ("", "cp.async.wait_group 1;"):
        out = run(COPY.replace("%w", wait).replace("%s", "8"), data, shared=SHARED)
        assert (out == 2**64 - 1).all()


def test_a_copy_that_nobody_waits_for() -> None:
    with pytest.raises(Pending, match="ends with asynchronous work"):
        run("mov.u32 %r2, near; shl.b32 %r3, %r1, 3; add.s32 %r2, %r2, %r3;"
            "cp.async.ca.shared.global [%r2], [%rd8], 8;", shared=SHARED)  # fmt: skip


def test_lanes_meet_again_after_a_branch() -> None:
    body = f"""setp.lt.u32 %p1, %r1, 7; mov.u32 %r6, 1; @%p1 bra LOW; mov.u32 %r6, 2; bra.uni MEET;
    LOW: add.s32 %r6, %r6, 9; MEET: bar.sync 0; redux.sync.add.s32 %r6, %r6, -1; {store()}"""
    assert (run(body) == 7 * 10 + 25 * 2).all()


SMALL = "setp.lt.u32 %p1, %r1, 9;"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("shfl.sync.bfly.b32 %r6, %r1, 5, 31, -1;", [i ^ 5 for i in range(32)]),
        ("shfl.sync.down.b32 %r6, %r1, 3, 31, -1;", [i + 3 if i < 29 else i for i in range(32)]),
        ("shfl.sync.up.b32 %r6, %r1, 3, 0, -1;", [i - 3 if i > 2 else i for i in range(32)]),
        ("shfl.sync.idx.b32 %r6, %r1, 2, 0x181F, -1;", [i // 8 * 8 + 2 for i in range(32)]),
        (f"{SMALL} vote.sync.ballot.b32 %r6, %p1, -1;", [511] * 32),
        (f"{SMALL} vote.sync.any.pred %p2, %p1, -1; selp.b32 %r6, 1, 0, %p2;", [1] * 32),
        (f"{SMALL} vote.sync.all.pred %p2, %p1, -1; selp.b32 %r6, 1, 0, %p2;", [0] * 32),
    ],
)  # fmt: skip
def test_lanes_exchange(line: str, wanted: list[int]) -> None:
    assert run(f"{line} {store()}").tolist() == wanted


def test_some_lanes_of_a_warp_shuffle_among_themselves() -> None:
    body = f"""setp.lt.u32 %p1, %r1, 8; mov.u32 %r6, 0;
    @%p1 shfl.sync.bfly.b32 %r6, %r1, 1, 0x181F, 0xFF; {store()}"""
    assert run(body).tolist() == [i ^ 1 for i in range(8)] + [0] * 24
