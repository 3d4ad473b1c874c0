"""What has to hold for a compiled kernel, and how two tables of figures differ."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from bench.sass import Function, count

SHARED_LIMIT = 232448  # bytes that a block can have on sm_90
# What the blocks of an SM share: bytes, of which each block has 1 KB for the system, and registers,
# which a warp gets by 256.
SM_SHARED, SM_REGISTERS = 233472, 65536


@dataclass(frozen=True)
class Required:
    """Instructions that a kernel is built around; "A or B" is one of both.

    Attributes:
        wide: of wide instances: Triton's with bf16, CUDA's but those that move single elements.
        always, never: of all instances.
        vector: place of the argument of a CUDA template that says how many elements are moved at
            once; an instance where it is 1 is not wide. None: all are.
    """

    wide: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    vector: int | None = None

    def opcodes(self) -> list[str]:
        return [o for text in (*self.wide, *self.always, *self.never) for o in text.split(" or ")]


MOVES = ("LDG.128", "STG.128")  # 16 bytes at once
VECTORS = Required(always=MOVES)
POINTER_GEMM = Required(("HGMMA", "LDGSTS"))
TMA_GEMM = Required(("HGMMA", "UTMALDG", "UTMASTG"))
# What epilogues take comes by pointers.
SAVING_TMA_GEMM = Required((*TMA_GEMM.wide, "LDG.128"))
# Correctly rounded: `/` in Triton is div.full.f32, which is off by up to 2 units in the last place.
QUANTISER = Required(always=(*MOVES, "div.rn.f32"), never=("div.full.f32",))
ROWS = Required(MOVES, vector=1)
EMBED = Required(("LDG.128",), vector=2)  # the wider of the table's dtype and x's
# No approximate quotient, no product with an approximate reciprocal.
APPROXIMATE = ("div.full.f32", "div.approx.f32", "rcp.approx.f32")
# 16 bytes in the wider of both dtypes, which is read or written.
CAST = Required(("LDG.128 or STG.128",), ("div.rn.f32",), APPROXIMATE, vector=3)
# Of configs.json and csrc/cuda; of a kernel that is not in here only spills and memory are checked.
REQUIRED = {
    "xsa_forward_kernel": VECTORS,
    "xsa_backward_kernel": VECTORS,
    "leaky_relu2_up_tma": TMA_GEMM,
    "leaky_relu2_dgrad_tma": SAVING_TMA_GEMM,
    "leaky_relu2_up": POINTER_GEMM,
    "leaky_relu2_dgrad": POINTER_GEMM,
    "xsa_linear_dgrad_tma": SAVING_TMA_GEMM,
    "linear_residual_tma": SAVING_TMA_GEMM,
    "norm_mlp_dgrad_tma": SAVING_TMA_GEMM,
    "linear_qk_rope_tma": TMA_GEMM,
    "newton_schulz_norms": Required(always=("LDG.128",)),
    "newton_schulz_scale": VECTORS,
    "newton_schulz_product": POINTER_GEMM,
    "fake_quant_forward_kernel": QUANTISER,
    "fake_quant_backward_kernel": QUANTISER,
    "part_sums_columns": Required(),  # eight columns of four bytes of a row at once
    "xsa_forward_rows": ROWS,
    "xsa_backward_rows": ROWS,
    "qk_rope_forward": ROWS,
    "qk_rope_backward_blocks": ROWS,
    "residual_norm_forward": ROWS,
    "residual_norm_backward_rows": ROWS,
    "scaled_copies_backward_rows": ROWS,
    "embed_smear_forward": EMBED,
    "embed_smear_chunks": EMBED,
    "token_order_blocks": Required(),
    "token_sums_columns": Required(("LDG.128",), vector=1),
    "embed_smear_rows": Required(("LDG.128",), vector=1),
    "softcap_cross_entropy_rows": ROWS,
    "leaky_relu2_words": ROWS,
    "leaky_relu2_backward_words": ROWS,
    "weight_cast_rows": CAST,
    "weight_cast_backward_rows": CAST,
    # One kernel for tensors that can and that cannot be moved in vectors.
    "grad_norm_chunks": Required(always=("LDG.128",)),
    "grad_norm_finish": Required(),
    "muon_momentum_rows": VECTORS,
    "param_update_chunks": VECTORS,
}

Row = Mapping[str, float]  # figures of a compiled kernel, as bench/results/aot.json holds them
# Figures that may get better, and by so much worse: the first ones by growing.
TOLERANCE = 0.05
COSTS, GAINS = ("instructions", "per_16_bytes", "barriers"), ("loads_in_flight", "warps")
EXECUTED = (*COSTS, *GAINS)


def row(kernel: str, function: Function, dynamic: int = 0) -> Row:
    """Registers, bytes of shared memory, local loads and stores, and the instructions required."""
    local = count(function.code, ("LDL", "STL"))
    required = count(function.code, REQUIRED.get(kernel, Required()).opcodes())
    return {
        "registers": function.registers, "shared": function.shared + dynamic,
        "spills": sum(local.values()), **required,
    }  # fmt: skip


def failures(name: str, kernel: str, wide: bool, row: Row) -> list[str]:
    """What is wrong with a compiled kernel, whatever the versions are; one line each."""
    required = REQUIRED.get(kernel, Required())
    found = [f"spills: {row['spills']} local loads and stores"] if row["spills"] else []
    if row["shared"] > SHARED_LIMIT:
        found.append(f"{row['shared']} bytes of shared memory, a block has {SHARED_LIMIT}")
    for opcodes in (*(required.wide if wide else ()), *required.always):
        if not any(row[opcode] for opcode in opcodes.split(" or ")):
            found.append(f"no {opcodes}")
    found += [opcode for opcode in required.never if row[opcode]]
    return [f"{name}: {text}" for text in found]


def crowded(name: str, row: Row, warps: int, blocks: int) -> list[str]:
    """Why so many blocks of a kernel do not fit onto an SM; one line each."""
    shared = blocks * (row["shared"] + 1024)
    registers = blocks * warps * -(-row["registers"] * 32 // 256) * 256
    return [
        f"{name}: {blocks} blocks an SM need {needed:.0f} {of}, it has {there}"
        for needed, of, there in (
            (shared, "bytes of shared memory", SM_SHARED),
            (registers, "registers", SM_REGISTERS),
        )
        if needed > there
    ]


def unreached(reached: Iterable[tuple[str, int]], known: Mapping[str, int]) -> list[str]:
    """Rows of configs.json (kernel -> number of rows) that no launch has used; one line each."""
    reached = set(reached)
    return [
        f"{kernel}: row {i} of configs.json is reached by no case of bench/aot_cases.py"
        for kernel, rows in known.items()
        for i in range(rows)
        if (kernel, i) not in reached
    ]


def differences(measured: Mapping[str, Row], recorded: Mapping[str, Row]) -> Iterator[str]:
    """Every figure that is not the recorded one, of EXECUTED if it is worse; one line each."""
    for name in sorted(measured.keys() | recorded.keys()):
        if name not in measured:
            yield f"{name}: in the table, but not compiled any more"
        elif name not in recorded:
            yield f"{name}: not in the table"
        else:
            old, new = recorded[name], measured[name]
            for figure in sorted(old.keys() | new.keys()):
                if _differs(figure, old.get(figure), new.get(figure)):
                    yield f"{name}: {figure} was {old.get(figure)}, is {new.get(figure)}"


def _differs(figure: str, old: float | None, new: float | None) -> bool:
    if old is None or new is None or figure not in EXECUTED:
        return old != new
    return new > old * (1 + TOLERANCE) if figure in COSTS else new < old * (1 - TOLERANCE)
