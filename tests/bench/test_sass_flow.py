"""Executed instructions: of SASS that is written here, and of kernels whose counts are known."""

import json
from functools import cache
from pathlib import Path

import pytest

from bench import aot_cuda, aot_items, aot_model
from bench.sass import Function, Instruction
from bench.sass_flow import Flow, loads_in_flight
from tests.bench.test_aot import needs_nvcc, needs_triton

COUNTED = Path(__file__).parent / "counted.cu"


@cache
def compiled() -> dict[str, Function]:
    return {k: f for k, _, f in aot_cuda.compile_source(COUNTED, aot_items.ARCH)}


def flow(kernel: str) -> Flow:
    return Flow(compiled()[kernel].code)


def count(executed: list[Instruction], base: str) -> int:
    return sum(i.base == base for i in executed)


# A load before a loop of 5 instructions, in which one is optional and skips the store; a rare
# subroutine; and a way around the loop.
WRITTEN = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   FADD R3, R2, R3 ;
        /*0040*/               @P1 BRA `(.L_x_3) ;
        /*0050*/                   STG.E.64 desc[UR4][R6.64], R8 ;
.L_x_3:
        /*0060*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/              @!P3 BRA `(.L_x_4) ;
        /*0090*/                   CALL.REL.NOINC `($slow) ;
        /*00a0*/                   FADD R9, R9, R9 ;
.L_x_4:
        /*00b0*/                   EXIT ;
.L_x_5:
        /*00c0*/                   BRA `(.L_x_5) ;
$slow:
        /*00d0*/                   RET.REL.NODEC R20 `($slow) ;
"""


@pytest.mark.parametrize(("trips", "stored", "total"), [(0, 0, 5), (1, 8, 10), (7, 56, 40)])
def test_a_loop_is_executed_as_often_as_it_is_said(trips: int, stored: int, total: int) -> None:
    executed = Flow(WRITTEN).executed([trips], stored)
    assert len(executed) == total and count(executed, "CALL") == 0
    assert count(executed, "STG") == trips


def test_of_two_ways_the_one_that_stores_as_much_is_taken() -> None:
    assert len(Flow(WRITTEN).executed([7], 0)) == 33  # none of the 7 stores


# As nvcc chooses between two widths: by a predicate, and then by a branch under the same one.
PREDICATED = """
        /*0000*/               @P1 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P1 LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P1 PRMT R6, R4, 0x7732, RZ ;
        /*0030*/                   LDG.E R12, desc[UR4][R10.64] ;
        /*0040*/               @P1 STG.E.128 desc[UR4][R8.64], R4 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   STG.E.64 desc[UR4][R8.64], R6 ;
.L_x_1:
        /*0070*/              @!P0 BRA `(.L_x_2) ;
        /*0080*/                   FADD R12, R12, R12 ;
.L_x_2:
        /*0090*/                   EXIT ;
"""


def test_a_branch_switches_off_what_its_predicate_guards() -> None:
    """16 bytes are stored, or 8, and never both."""
    wide = Flow(PREDICATED).executed([], 24)
    assert [i.opcode for i in wide if i.base == "STG"] == ["STG.E.128"]
    narrow = Flow(PREDICATED).executed([], 8)
    assert [i.opcode for i in narrow if i.base == "STG"] == ["STG.E.128", "STG.E.64"]
    assert sum(i.bytes for i in wide if i.base == "LDG") == 20
    assert loads_in_flight(wide) == 2, "the narrower elements are not loaded, and not used"


def test_what_is_rare_and_moves_nothing_counts_where_it_is_not_said() -> None:
    flow = Flow(PREDICATED)
    assert len(flow.executed([], 16)) - len(flow.executed([], 16, shortest=True)) == 1


def test_of_a_kernel_that_stores_nothing_the_loads_are_those_of_its_work() -> None:
    none = "/*0000*/ @P0 BRA `(.L_x_1) ;\n/*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ;\n"
    flow = Flow(none + ".L_x_1:\n/*0020*/ LDG.E.64 R8, desc[UR4][R2.64] ;\n/*0030*/ EXIT ;")
    assert [len(flow.executed([], 0, loaded)) for loaded in (8, 24)] == [3, 4]
    with pytest.raises(ValueError, match="a lane loads 24 bytes, not 64"):
        flow.executed([], 0, 64)


def test_other_loops_and_other_stores_than_declared_are_refused() -> None:
    message = "2 trip counts for 1 loops: depth 0 5 instructions 1 STGx8"
    with pytest.raises(ValueError, match=message):
        Flow(WRITTEN).executed([1, 1], 8)
    with pytest.raises(ValueError, match="a lane stores 56 bytes, not 80, with these trips: depth"):
        Flow(WRITTEN).executed([7], 80)


def test_a_jump_through_a_register_is_refused() -> None:
    with pytest.raises(ValueError, match="BRX jumps through a register"):
        Flow("/*0000*/ BRX R2 `(.L_x_1) ;\n/*0010*/ EXIT ;")


@needs_triton
@needs_nvcc
@pytest.mark.parametrize(
    ("kernel", "trips", "stored", "ffma", "loads", "stores"),
    [
        ("straight", (), 16, 3, 1, 1),
        ("looped", (1,), 4, 3, 1, 1),
        ("looped", (7,), 28, 21, 7, 7),
        ("nested", (5, 11), 20, 5 * (11 * 3 + 3), 5, 5),
        ("optional", (), 4, 3, 2, 1),
    ],
)  # fmt: skip
def test_known_counts(
    kernel: str, trips: tuple[int, ...], stored: int, ffma: int, loads: int, stores: int
) -> None:
    executed = flow(kernel).executed(trips, stored)
    counts = [count(executed, base) for base in ("FFMA", "LDG", "STG")]
    assert counts == [ffma, loads, stores]


@needs_triton
@needs_nvcc
def test_all_instructions_count() -> None:
    """As many as stand before EXIT where nothing jumps, and a loop's for each further trip."""
    lines = compiled()["straight"].code.splitlines()
    text = [line for line in lines if "/*" in line and line.rstrip().endswith(";")]
    end = next(i for i, line in enumerate(text) if "EXIT" in line)
    assert len(flow("straight").executed((), 16)) == end + 1
    nested = flow("nested")
    once, twice = (len(nested.executed((3, m), 12)) for m in (4, 5))
    inner = min(nested.loops, key=lambda loop: len(loop.blocks))
    body = sum(len(nested.blocks[block].instructions) for block in inner.blocks)
    assert twice - once == 3 * body and 5 <= body <= 8


@needs_triton
@needs_nvcc
def test_a_rare_subroutine_is_not_called() -> None:
    executed = flow("divided").executed((), 4)
    assert "CALL" in compiled()["divided"].code
    assert count(executed, "CALL") == 0 and count(executed, "MUFU") == 1


@needs_triton
@needs_nvcc
def test_the_compilers_versions_of_a_loop_for_other_lengths_are_left_out() -> None:
    """8 elements in the steps that nvcc unrolled, whatever else it made for other numbers."""
    unrolled = flow("unrolled")
    stores = [
        sum(i.base == "STG" for b in loop.blocks for i in unrolled.blocks[b].instructions)
        for loop in unrolled.loops
    ]
    assert 4 in stores, stores
    trips = [2 if n == 4 else 0 for n in stores]
    executed = unrolled.executed(trips, 32)
    assert [count(executed, base) for base in ("FFMA", "LDG", "STG")] == [8, 8, 8]


@needs_triton
@needs_nvcc
@pytest.mark.parametrize(("kernel", "loads"), [("together", 4), ("chained", 1), ("straight", 1)])
def test_loads_in_flight(kernel: str, loads: int) -> None:
    assert loads_in_flight(flow(kernel).executed((), 16 if kernel == "straight" else 4)) == loads


@needs_triton
@needs_nvcc
def test_warps_of_an_sm() -> None:
    assert compiled()["straight"].threads == 256 and compiled()["looped"].threads == 96
    assert aot_items.warps(compiled()["straight"]) == 64


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "warps"),
    [
        (32, 0, 256, 64), (33, 0, 256, 48), (153, 16384, 256, 8), (48, 0, 256, 40),
        (255, 0, 128, 8), (32, 50000, 256, 32), (16, 0, 32, 32),
    ],
)  # fmt: skip
def test_registers_shared_memory_and_blocks_limit_warps(
    registers: int, shared: int, threads: int, warps: int
) -> None:
    assert aot_items.warps(Function(registers, shared, "", threads)) == warps


def test_kernels_whose_work_is_counted_are_there() -> None:
    assert aot_items.ITEMS.keys() <= aot_cuda.kernels()


def test_the_model_takes_the_larger_bound_and_shows_what_was_measured() -> None:
    h100, h200 = aot_model.GPUS
    issue, memory = aot_model.bounds("softcap_cross_entropy_rows", 2640, h100)
    # 98,304 rows x 2,640 / (132 x 4 x 1.755 GHz), and 98,304 x 4,096 bytes / (0.9 x 3,350 GB/s)
    assert issue == pytest.approx(280.07, abs=0.01) and memory == pytest.approx(133.55, abs=0.01)
    assert aot_model.bounds("softcap_cross_entropy_rows", 2640, h200)[1] < memory
    mine = "void pgolf::cuda::softcap_cross_entropy_rows<pgolf::bf16, 8, false>(pgolf::LossShape)"
    profiles = [
        {"device": "NVIDIA H100 80GB HBM3", "profile": {"kernels": [
            {"name": mine, "calls": 2.0, "us": us}, {"name": "softcap", "calls": 1.0, "us": 1.0},
        ]}}
        for us in (800.0, 700.0)
    ]  # fmt: skip
    lines = [*profiles, {"device": "NVIDIA H100", "profile": None}, {"device": "CPU"}]
    rows = {"softcap_cross_entropy_rows<bf16, 8, false>: a.cu sm_90a": {"instructions": 2640}}
    text = aot_model.page(rows, lines)
    assert text[0].startswith("A MODEL, not measured")
    _, of_h100, of_h200 = text[-1].split("|")
    assert of_h100.split() == ["280", "134", "280", "350"]
    assert of_h200.split() == ["280", "93", "280", "-"]


def test_what_was_measured_is_found_in_the_folder_of_its_device(tmp_path) -> None:
    kernels = [{"name": "xsa_forward_rows<float>", "calls": 2.0, "us": 30.0}]
    for folder, device in (("nvidia-h200", "NVIDIA H200"), ("gh200", "NVIDIA GH200 480GB")):
        (tmp_path / folder).mkdir()
        kernels[0]["us"] /= 2
        line = {"device": device, "profile": {"kernels": kernels}}
        (tmp_path / folder / "step.jsonl").write_text(json.dumps(line) + "\n")
    lines = aot_model.results(tmp_path)
    assert len(lines) == 2
    h100, h200 = aot_model.GPUS
    assert aot_model.measured("xsa_forward_rows", h200, lines) == 7.5
    assert aot_model.measured("xsa_forward_rows", h100, lines) is None
