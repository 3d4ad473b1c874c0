"""The PTX interpreter itself: what it computes, and that it reports every kind of fault."""

import struct

import numpy as np
import pytest
import torch

from . import formats
from .machine import launch
from .memory import GlobalMemory
from .parser import Address, Immediate, Module, Register, Vector, statements

HEAD = """
.version 8.8
.target sm_90a
.address_size 64
"""


def kernel_text(body: str, shared: str = "", registers: str = "") -> str:
    """A kernel k(in, out) in whose body %rd8, %rd9 are this thread's 8 bytes of in and of out."""
    return f"""{HEAD}
.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0, .param .u64 k_param_1)
{{
    .reg .pred %p<10>; .reg .b16 %h<10>; .reg .b32 %r<40>; .reg .b64 %rd<20>; {registers}
    {shared}
    ld.param.u64 %rd1, [k_param_0];
    ld.param.u64 %rd2, [k_param_1];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 8;
    add.s64 %rd8, %rd1, %rd3;
    add.s64 %rd9, %rd2, %rd3;
    {body}
    ret;
}}
"""


def run(
    body: str, data: np.ndarray | None = None, threads: int = 32, shared: str = "", **options
) -> np.ndarray:
    """uint64 (threads,): what the kernel stored in out; data are the bytes of in."""
    source = torch.zeros(threads, dtype=torch.int64)
    if data is not None:
        source.numpy().view(np.uint8)[: data.nbytes] = data.view(np.uint8)
    out = torch.zeros(threads, dtype=torch.int64)
    memory = GlobalMemory()
    memory.add(source)
    memory.add(out)
    arguments = [struct.pack("<Q", t.data_ptr()) for t in (source, out)]
    kernel = Module(kernel_text(body, shared)).kernel()
    launch(kernel, (1,), (threads,), arguments, memory, **options)
    return out.numpy().view(np.uint64)


def compute(line: str, *columns: np.ndarray, kind: type = np.float32) -> np.ndarray:
    """`line` computes %r20 from %r10, %r11, ...: columns of 32-bit numbers, one a lane."""
    words = np.zeros((32, 4), np.uint32)
    for i, column in enumerate(columns):
        words[: len(column), i] = np.asarray(column).view(np.uint32)
    source, out = torch.from_numpy(words.view(np.int32)), torch.zeros(32, dtype=torch.int32)
    memory = GlobalMemory()
    memory.add(source)
    memory.add(out)
    body = f"""
    mul.wide.u32 %rd4, %r1, 16;
    add.s64 %rd4, %rd1, %rd4;
    ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd4];
    {line}
    mul.wide.u32 %rd5, %r1, 4;
    add.s64 %rd5, %rd2, %rd5;
    st.global.b32 [%rd5], %r20;
    """
    arguments = [struct.pack("<Q", t.data_ptr()) for t in (source, out)]
    launch(Module(kernel_text(body)).kernel(), (1,), (32,), arguments, memory)
    return out.numpy().view(kind)[: len(columns[0])]


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_the_parser_reads_scopes_labels_and_operands() -> None:
    text = """
    { .reg .pred p; setp.lt.s32 p, %r1, -3; @!p bra $L__1; }
    $L__1: st.shared::cta.v2.b32 [ %r2 + 0x10 ], { %r3, 0f3F800000 };
    """
    assert [s.split()[0] for s in statements(text)] == [
        "{", ".reg", "setp.lt.s32", "@!p", "}", "$L__1:", "st.shared::cta.v2.b32",
    ]  # fmt: skip
    kernel = Module(kernel_text(text)).kernel()
    assert kernel.registers["p@1"] == "pred" and kernel.registers["%rd19"] == "b64"
    assert [array.size for array in kernel.parameters.values()] == [8, 8]
    compare, branch, store = kernel.instructions[6:9]
    assert compare.operands == (Register("p@1"), Register("%r1"), Immediate(2**64 - 3))
    assert branch.guard == Register("p@1", negated=True) and branch.target == 8
    address, values = store.operands
    assert address == Address(Register("%r2"), 16)
    assert values == Vector((Register("%r3"), Immediate(0x3F800000, 4)))


def test_structs_are_parameters() -> None:
    text = f"""{HEAD}.entry k(.param .align 8 .b8 k_param_0[24], .param .u32 k_param_1)
    {{ .reg .b32 %r<4>; .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [k_param_0+16]; ld.param.u32 %r1, [k_param_1];
    mov.b64 %rd2, k_param_0; ld.param.s16 %r2, [%rd2+2];
    st.global.v2.b32 [%rd1], {{%r1, %r2}}; ret; }}"""
    out, memory = torch.zeros(2, dtype=torch.int32), GlobalMemory()
    memory.add(out)
    struct_bytes = struct.pack("<hhiqQ", 0, -5, 0, 0, out.data_ptr())
    launch(Module(text).kernel(), (1,), (32,), [struct_bytes, struct.pack("<i", 7)], memory)
    assert out.tolist() == [7, -5]
    with pytest.raises(ValueError, match="has 24 bytes, its argument 8"):
        launch(Module(text).kernel(), (1,), (32,), [bytes(8), bytes(4)], memory)


INTEGERS = np.array([0, 1, 5, 2**31 - 1, 2**31, 2**32 - 5, 2**32 - 1], np.uint32)


@pytest.mark.parametrize(
    ("line", "function"),
    [
        ("add.s32 %r20, %r10, %r11;", lambda a, b: a + b),
        ("mul.lo.s32 %r20, %r10, %r11;", lambda a, b: a * b),
        ("mul.hi.u32 %r20, %r10, %r11;", lambda a, b: a * b >> 32),
        ("max.u32 %r20, %r10, %r11;", max),
        ("lop3.b32 %r20, %r10, %r11, %r12, 0xC0;", lambda a, b: a & b),
        ("shr.u32 %r20, %r10, %r11;", lambda a, b: a >> b if b < 32 else 0),
        ("shf.l.wrap.b32 %r20, %r11, %r10, 5;", lambda a, b: a << 5 | b >> 27),
        ("bfe.u32 %r20, %r10, 4, 8;", lambda a, b: a >> 4 & 255),
        ("bfi.b32 %r20, %r10, %r11, 8, 4;", lambda a, b: b & ~0xF00 | (a & 15) << 8),
        ("prmt.b32 %r20, %r10, %r11, 0x5410;", lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16),
        ("popc.b32 %r20, %r10;", lambda a, b: a.bit_count()),
        ("clz.b32 %r20, %r10;", lambda a, b: 32 - a.bit_length()),
        ("selp.b32 %r20, %r10, %r11, 1;", lambda a, b: a),
    ],
)
def test_integers(line: str, function) -> None:
    a, b = (grid.ravel() for grid in np.meshgrid(INTEGERS[:5], INTEGERS[2:]))
    wanted = [function(int(x), int(y)) % 2**32 for x, y in zip(a, b, strict=True)]
    assert compute(line, a, b, kind=np.uint32).tolist() == wanted


@pytest.mark.parametrize(("a", "b"), [(7, 2), (-7, 2), (7, -2), (-7, -2), (0, 3)])
def test_signed_division_goes_towards_zero(a: int, b: int) -> None:
    columns = np.array([a], np.int32), np.array([b], np.int32)
    quotient = compute("div.s32 %r20, %r10, %r11;", *columns, kind=np.int32)[0]
    rest = compute("rem.s32 %r20, %r10, %r11;", *columns, kind=np.int32)[0]
    assert (quotient, rest) == (int(a / b), a - int(a / b) * b)


SPECIAL = floats(0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan, 1e-45, 3e38)


@pytest.mark.parametrize(
    ("line", "function"),
    [
        ("add.f32 %r20, %r10, %r11;", np.add),
        ("mul.rn.f32 %r20, %r10, %r11;", np.multiply),
        ("div.rn.f32 %r20, %r10, %r11;", np.divide),
        ("max.f32 %r20, %r10, %r11;", np.fmax),
        ("min.NaN.f32 %r20, %r10, %r11;", np.minimum),
        ("neg.f32 %r20, %r10;", lambda a, b: -a),
        ("sqrt.rn.f32 %r20, %r10;", lambda a, b: np.sqrt(a)),
    ],
)
def test_special_numbers(line: str, function) -> None:
    for b in SPECIAL:
        with np.errstate(all="ignore"):
            wanted = function(SPECIAL, np.full_like(SPECIAL, b))
        got = compute(line, SPECIAL, np.full_like(SPECIAL, b))
        np.testing.assert_array_equal(got, wanted)
    assert (formats.canonical(got).view(np.uint32) == got.view(np.uint32)).all()


@pytest.mark.parametrize(
    ("name", "wanted"), [("lt", 0), ("ltu", 1), ("ne", 0), ("neu", 1), ("num", 0), ("nan", 1)]
)
def test_comparisons_with_nan(name: str, wanted: int) -> None:
    line = f"setp.{name}.f32 %p1|%p2, %r10, %r11; selp.b32 %r20, 1, 0, %p1;"
    assert compute(line, floats(np.nan), floats(1.0), kind=np.uint32)[0] == wanted
    line = line.replace("0, %p1", "0, %p2")
    assert compute(line, floats(np.nan), floats(1.0), kind=np.uint32)[0] == 1 - wanted


def test_a_fused_product_and_sum_is_rounded_once() -> None:
    a, b = np.float32(1 + 2**-13), np.float32(1 - 2**-13)
    exact = float(a) * float(b) - 1.0  # -2^-26, which a rounded product has lost
    got = compute("fma.rn.f32 %r20, %r10, %r11, %r12;", floats(a), floats(b), floats(-1.0))
    assert got[0] == np.float32(exact) != a * b - np.float32(1)
    # The sum lies 2^-60 beside the middle of two float32: float64 would round it onto the middle.
    middle, little = np.float32(2**-24), np.float32(2**-60)
    one = floats(1.0)
    with_little = compute("fma.rn.f32 %r20, %r10, %r11, %r12;", floats(little), one, one)
    assert with_little[0] == 1.0
    line = "fma.rn.f32 %r20, %r10, %r11, %r12;"
    assert compute(line, floats(2**-12 * (1 + 2**-23)), floats(2**-12), one)[0] > 1.0
    assert compute(line, floats(2**-12), floats(2**-12), one)[0] == 1.0 == one[0] + middle
    down = compute("fma.rm.f32 %r20, %r10, %r11, %r12;", one, floats(-little), one)
    assert down[0] == np.nextafter(np.float32(1), np.float32(0))


@pytest.mark.parametrize(
    ("line", "x", "wanted"),
    [
        ("cvt.rni.s32.f32 %r20, %r10;", 2.5, 2),
        ("cvt.rni.s32.f32 %r20, %r10;", 3.5, 4),
        ("cvt.rzi.s32.f32 %r20, %r10;", -2.9, -2),
        ("cvt.rzi.s32.f32 %r20, %r10;", np.nan, 0),
        ("cvt.rzi.s32.f32 %r20, %r10;", 1e20, 2**31 - 1),
        ("cvt.rzi.u32.f32 %r20, %r10;", -7.0, 0),
        ("cvt.rn.f16.f32 %h1, %r10; cvt.u32.u16 %r20, %h1;", 1 + 2**-11, 0x3C00),
        ("cvt.rn.f16.f32 %h1, %r10; cvt.u32.u16 %r20, %h1;", 1 + 3 * 2**-11, 0x3C02),
        ("cvt.rn.bf16.f32 %h1, %r10; cvt.u32.u16 %r20, %h1;", 1 + 2**-8, 0x3F80),
        ("cvt.rn.bf16.f32 %h1, %r10; cvt.u32.u16 %r20, %h1;", 1 + 3 * 2**-8, 0x3F82),
        ("cvt.rn.bf16.f32 %h1, %r10; cvt.u32.u16 %r20, %h1;", np.nan, 0x7FFF),
        ("cvt.rn.bf16x2.f32 %r20, %r10, 0f3F800000;", 2.0, 0x40003F80),
        ("cvt.rna.tf32.f32 %r20, %r10;", 1 + 2**-11, 0x3F802000),
        ("cvt.sat.f32.f32 %r20, %r10;", 7.0, 0x3F800000),
    ],
)
def test_conversions(line: str, x: float, wanted: int) -> None:
    assert compute(line, floats(x), kind=np.int32)[0] == wanted


def test_bf16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
    x = bits.view(np.float32)
    x = x[~np.isnan(x)]
    wanted = torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    with np.errstate(all="ignore"):
        assert (formats.round_bf16(x) == wanted).all()


def test_what_may_be_off_is_off_by_no_more() -> None:
    x = floats(*np.linspace(1, 10, 32))
    exact = 1 / x.astype(np.float64)
    got = compute("div.full.f32 %r20, 0f3F800000, %r10;", x)
    ulps = np.abs(got - exact) / np.spacing(exact.astype(np.float32))
    assert 1 < ulps.max() <= 2.5
    assert compute("rcp.approx.ftz.f32 %r20, %r10;", floats(0.0, np.inf)).tolist() == [np.inf, 0.0]
